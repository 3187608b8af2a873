"""FastVID, one video at a time, written from the equations."""

import math

import torch

from foveate.methods.fastvid import FastVID


def transcription(tensors, keep, segments=8, tau=0.9, d=0.4, p=4, beta=0.6):
    """(K, D) features from (T, P, D) tokens `x` and (T, P) `received_attention`."""
    x, attention = tensors["x"].double(), tensors["received_attention"]
    frames, cells, width = x.shape
    frame = x.mean(1)
    alike = [
        float(torch.cosine_similarity(frame[t], frame[t + 1], dim=0)) for t in range(frames - 1)
    ]
    smallest = sorted(range(frames - 1), key=alike.__getitem__)[: segments - 1]
    cuts = sorted({*smallest, *(t for t in range(frames - 1) if alike[t] < tau)})
    budget = int(cells * keep)
    salient_count = budget - int(budget * d)
    context = budget - salient_count
    salient = [
        sorted(range(cells), key=lambda i: -float(attention[t, i]))[:salient_count]
        for t in range(frames)
    ]
    rest = [[i for i in range(cells) if i not in salient[t]] for t in range(frames)]
    out = {(t, i): x[t, i] for t in range(frames) for i in salient[t]}
    for first, last in zip([0, *(t + 1 for t in cuts)], [*cuts, frames - 1], strict=True):
        length = last - first + 1
        anchors = list(range(last, first - 1, -p))
        members = [(t, i) for t in range(first, last + 1) for i in rest[t]]
        for anchor in anchors:
            count = context * length // len(anchors)
            if count == context:
                members = [(anchor, i) for i in rest[anchor]]
            count = min(count, len(rest[anchor]))
            rank = _peaks(x[anchor, rest[anchor]], width)
            order = sorted(range(len(rank)), key=lambda n: -rank[n])[:count]
            targets = [rest[anchor][n] for n in sorted(order)]
            joined = {i: [] for i in targets}
            for t, i in members:
                cosines = [torch.cosine_similarity(x[t, i], x[anchor, j], dim=0) for j in targets]
                if targets:
                    joined[targets[int(torch.stack(cosines).argmax())]].append(x[t, i])
            for i, values in joined.items():
                own = max(beta, 1 / (len(values) + 1))
                mean = torch.stack(values).mean(0) if values else x[anchor, i]
                out[anchor, i] = own * x[anchor, i] + (1 - own) * mean
    return torch.stack([out[place] for place in sorted(out)])


def _peaks(points, width):
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    far = (far / math.sqrt(width)).tolist()
    density = []
    for row in far:
        near = sorted(row)[:4]
        density.append(math.exp(-sum(n * n for n in near) / len(near)))
    rank = []
    for i, row in enumerate(far):
        denser = [row[j] for j in range(len(far)) if density[j] > density[i]]
        rank.append(density[i] * (min(denser) if denser else max(map(max, far))))
    return rank


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, of three scenes."""
    frames, cells, width = 16, v // 16, 3584
    scene = torch.randn(batch, 3, cells, width, generator=generator)
    noise = torch.randn(batch, frames, cells, width, generator=generator)
    return {
        "x": scene[:, torch.arange(frames) * 3 // frames] + 0.5 * noise,
        "received_attention": torch.rand(batch, frames, cells, generator=generator),
    }


def method(keep):
    """The method with the same share."""
    return FastVID(keep=keep)


CASES = {
    "fastvid": (lambda tensors, _: transcription(tensors, 0.25), inputs, lambda _: method(0.25))
}
