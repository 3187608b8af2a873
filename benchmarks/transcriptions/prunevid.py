"""PruneVid before the language model, one video at a time, written from the equations."""

import math
from itertools import combinations, groupby

import torch

from foveate.methods.prunevid import PruneVid


def transcription(tensors, tau=0.8, frame_ratio=0.25, cluster_ratio=0.5, k=7):
    """(K, D) features from (T, P, D) tokens `x`."""
    x = tensors["x"].double()
    frames, cells = x.shape[:2]
    _, labels = clusters(x.mean(1), max(int(frames * frame_ratio), 1), k)
    out, start = [], 0
    for _, run in groupby(refined(labels)):
        length = len(list(run))
        window = x[start : start + length]
        static = []
        for i in range(cells):
            pairs = [
                float(torch.cosine_similarity(window[a, i], window[b, i], dim=0))
                for a, b in combinations(range(length), 2)
            ]
            if pairs and sum(pairs) / len(pairs) > tau:
                static.append(i)
        moving = [i for i in range(cells) if i not in static]
        for points in [window[:, static].mean(0), *window[:, moving]]:
            out += average(points, cluster_ratio, k)
        start += length
    return torch.stack(out)


def refined(labels):
    """Labels of frames after stray runs have joined their neighbours."""
    runs, start = [], 0
    for label, run in groupby(labels):
        length = len(list(run))
        runs.append((label, start, length))
        start += length
    result = [None] * len(labels)
    for label, start, length in runs:
        if length > 1 and length == max(n for other, _, n in runs if other == label):
            result[start : start + length] = [label] * length
    for t in range(len(result)):
        if result[t] is not None:
            continue
        end = t
        while end < len(result) and result[end] is None:
            end += 1
        left = next((n for n in range(t) if result[t - 1 - n] != result[t - 1]), t)
        ahead = result[end:]
        right = len(list(next(groupby(ahead))[1])) if ahead else 0
        label = 0
        if left or right:
            label = result[t - 1] if left >= right else result[end]
        result[t:end] = [label] * (end - t)
    return result


def average(points, ratio, k):
    """Points as they are while they are few, else means of their clusters."""
    if len(points) <= 14:
        return list(points)
    _, joined = clusters(points, int(len(points) * ratio), k)
    return [
        torch.stack([points[i] for i, c in enumerate(joined) if c == n]).mean(0)
        for n in range(max(joined) + 1)
    ]


def clusters(points, count, k):
    """Centers, the strongest first, and the cluster of each of (N, D) points."""
    total, width = points.shape
    far = [[float((a - b).norm()) / math.sqrt(width) for b in points] for a in points]
    density = []
    for row in far:
        near = sorted(row)[: min(k, total)]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    rank = []
    for i, row in enumerate(far):
        denser = [row[j] for j in range(total) if density[j] > density[i]]
        rank.append(density[i] * (min(denser) if denser else max(map(max, far))))
    centers = sorted(range(total), key=lambda i: -rank[i])[:count]
    joined = [min(range(count), key=lambda c: row[centers[c]]) for row in far]
    for number, center in enumerate(centers):
        joined[center] = number
    return centers, joined


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, of three scenes."""
    frames, cells, width = 16, v // 16, 3584
    scene = torch.randn(batch, 3, cells, width, generator=generator)
    noise = torch.randn(batch, frames, cells, width, generator=generator)
    loud = torch.rand(batch, 1, cells, 1, generator=generator)
    return {"x": scene[:, torch.arange(frames) * 3 // frames] + loud * noise}


def method():
    """The method with its published settings."""
    return PruneVid()


CASES = {"prunevid": (lambda tensors, _: transcription(tensors), inputs, lambda _: method())}
