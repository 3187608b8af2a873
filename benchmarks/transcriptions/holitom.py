"""HoliTom outside the language model, one video at a time, written from the equations."""

import math

import torch

from foveate.methods.holitom import HoliTom


def transcription(tensors, keep, tau=0.8, beta=0.6, k=7, window=1024):
    """(K, D) features from (T, P, D) tokens `x` and (T, P) `received_attention`."""
    x, attention = tensors["x"].double(), tensors["received_attention"]
    frames, cells = x.shape[:2]
    same = torch.cosine_similarity(x[1:], x[:-1], dim=-1) > tau

    def still(first, last):
        return [
            i for i in range(cells) if last > first and all(same[t, i] for t in range(first, last))
        ]

    best, cut = [0], []
    for last in range(frames):
        options = [
            (best[first] + len(still(first, last)) * (last - first), first)
            for first in range(last, max(last - window, -1), -1)
        ]
        value, first = max(options, key=lambda option: option[0])
        best.append(value)
        cut.append(first)
    segments, last = [], frames - 1
    while last >= 0:
        segments.insert(0, (cut[last], last))
        last = cut[last] - 1
    share = min(keep / ((frames * cells - best[-1]) / (frames * cells)), 1)
    out = []
    for first, last in segments:
        static = still(first, last)
        moving = [i for i in range(cells) if i not in static]
        wanted = round(len(static) * share) or (1 if not moving else 0)
        if wanted:
            out += merge(x[first : last + 1, static].mean(0), wanted, k, beta)
        for t in range(first, last + 1):
            wanted = math.ceil(len(moving) * share)
            ranked = sorted(moving, key=lambda i: -float(attention[t, i]))[:wanted]
            out += [x[t, i] for i in sorted(ranked)]
    return torch.stack(out)


def merge(points, clusters, k, beta):
    """Values of the clusters of (N, D) points, in the order of their centers."""
    total, width = points.shape
    far = [[float((a - b).norm()) / math.sqrt(width) for b in points] for a in points]
    density = []
    for row in far:
        near = sorted(row)[: min(k, total)]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    apart = []
    for i in range(total):
        denser = [far[i][j] for j in range(total) if density[j] > density[i]]
        apart.append(min(denser) if denser else max(map(max, far)))
    rank = [density[i] * apart[i] for i in range(total)]
    centers = sorted(sorted(range(total), key=lambda i: -rank[i])[:clusters])
    members = {center: [] for center in centers}
    for i in range(total):
        if i not in members:
            members[min(centers, key=lambda c: far[i][c])].append(i)
    return [
        beta * points[c] + (1 - beta) * points[others].mean(0) if others else points[c]
        for c, others in members.items()
    ]


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, of three scenes."""
    frames, cells, width = 16, v // 16, 3584
    scene = torch.randn(batch, 3, cells, width, generator=generator)
    which = torch.arange(frames) * 3 // frames
    noise = torch.randn(batch, frames, cells, width, generator=generator)
    loud = torch.rand(batch, 1, cells, 1, generator=generator) * 0.8
    return {
        "x": scene[:, which] + loud * noise,
        "received_attention": torch.rand(batch, frames, cells, generator=generator),
    }


def method(keep):
    """The method with the same share."""
    return HoliTom(keep=keep)


CASES = {
    "holitom": (lambda tensors, _: transcription(tensors, 0.25), inputs, lambda _: method(0.25))
}
