"""FlashVID, one video at a time, written from the definition."""

import math

import torch
import torch.nn.functional as F

from foveate.methods.flashvid import FlashVID


def transcription(tensors, keep, alpha=0.7, threshold=0.8, tau=0.9, segments=8, expansion=1.25):
    """(K, D) features from (T, P, D) tokens `x` and (T, P) `received_attention`."""
    x, attention = tensors["x"].double(), tensors["received_attention"].double()
    frames, cells = attention.shape
    share = keep if isinstance(keep, float) else keep / (frames * cells)
    budget = math.ceil(cells * share * expansion)
    number = math.ceil(budget * alpha)
    frame = x.mean(1)
    alike = F.cosine_similarity(frame[1:], frame[:-1], dim=-1).tolist()
    smallest = sorted(range(frames - 1), key=alike.__getitem__)[: segments - 1]
    cuts = sorted({*smallest, *(t for t in range(frames - 1) if alike[t] < tau)})
    out = {}
    for first, last in zip([0, *(t + 1 for t in cuts)], [*cuts, frames - 1], strict=True):
        scene = frame[first : last + 1].mean(0)
        rest = {}
        for t in range(first, last + 1):
            picked = _diverse(x[t], attention[t] * (x[t] @ scene), number)
            out |= {(t, i): x[t, i] for i in picked}
            rest[t] = [i for i in range(cells) if i not in picked]
        trees = _trees(x, rest, threshold, budget)
        clusters = (budget - number) * (last + 1 - first)
        ratio = clusters / max(sum(len(own) for own in trees.values()), 1)
        for t, own in trees.items():
            out |= _clustered(t, own, math.ceil(len(own) * ratio) if ratio < 1 else len(own))
    return torch.stack([out[place] for place in sorted(out)])


def _diverse(x, weight, count):
    """Tokens as far from each other as possible, where distances to them are weighted."""
    unit = F.normalize(x, dim=-1)
    distance = (1 - unit @ unit.T) * weight
    picked = [int(distance.sort(0).values[1].argmax())] if count else []
    while len(picked) < count:
        nearest = distance[picked].amin(0)
        nearest[picked] = -torch.inf
        picked.append(int(nearest.argmax()))
    return picked


def _trees(x, rest, threshold, budget):
    """Frame -> its roots, each with the mean of its tree."""
    unit = F.normalize(x, dim=-1)
    best, joins = {}, {}
    for t, own in rest.items():
        if t - 1 in rest and rest[t - 1]:
            like = unit[t, own] @ unit[t - 1, rest[t - 1]].T
            for i, row in zip(own, like, strict=True):
                best[t, i], joins[t, i] = float(row.max()), rest[t - 1][int(row.argmax())]
    most = len(rest) * (x.shape[1] - budget)
    limit = threshold
    if sum(value > threshold for value in best.values()) > most:
        limit = sorted(best.values(), reverse=True)[most - 1]
    root, members = {}, {}
    for t, own in rest.items():
        for i in own:
            merges = best.get((t, i), -1) > limit
            root[t, i] = root[t - 1, joins[t, i]] if merges else (t, i)
            members.setdefault(root[t, i], []).append(x[t, i])
    return {
        t: {i: torch.stack(members[t, i]).mean(0) for i in own if root[t, i] == (t, i)}
        for t, own in rest.items()
    }


def _clustered(t, own, count):
    """Clusters of a frame's trees, by the place of their centers."""
    places, x = list(own), torch.stack(list(own.values())) if own else None
    if count == 0 or count >= len(places):
        return {(t, i): value for i, value in own.items()} if count else {}
    rank = _peaks(x, x.shape[1], min(count, 7))
    centers = sorted(range(len(places)), key=lambda n: -rank[n])[:count]
    joined = torch.cdist(x, x[centers]).argmin(1).tolist()
    for number, center in enumerate(centers):
        joined[center] = number
    return {
        (t, places[center]): x[[n for n, into in enumerate(joined) if into == number]].mean(0)
        for number, center in enumerate(centers)
    }


def _peaks(points, width, count):
    """How much each point is a peak of density."""
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    far = (far / math.sqrt(width)).tolist()
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    rank = []
    for i, row in enumerate(far):
        denser = [row[j] for j in range(len(far)) if density[j] > density[i]]
        rank.append(density[i] * (min(denser) if denser else max(map(max, far))))
    return rank


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, of three scenes."""
    frames, cells, width = 16, v // 16, 3584
    scene = torch.randn(batch, 3, cells, width, generator=generator) + 0.5
    noise = torch.randn(batch, frames, cells, width, generator=generator)
    return {
        "x": scene[:, torch.arange(frames) * 3 // frames] + 0.5 * noise,
        "received_attention": torch.rand(batch, frames, cells, generator=generator),
    }


def method(keep):
    """The method that aims at as many; the share is that of all inputs here, a quarter."""
    return FlashVID(keep=0.25)


CASES = {"flashvid": (transcription, inputs, method)}
