"""SparseVLM's first drop, one image at a time, written from the paper's definition.

Recycling takes all differences of recycled tokens, as clustering is usually written; density has no
random noise, so that results can be compared.
"""

import torch

from foveate.methods.sparsevlm import SparseVLM

HEADS, ASKED, WIDTH = 32, 60, 4096


def transcription(tensors, keep):
    """(K, D) kept tokens in raster order, then recycled ones.

    `question_relevance` is (Q), `question_attention` (1, H, Q, V) and `x` (V, D).
    """
    relevance, x = tensors["question_relevance"], tensors["x"]
    raters = relevance > relevance.mean()
    scores = tensors["question_attention"][0].mean(0)[raters].mean(0)
    order = scores.sort(descending=True).indices
    kept, rest = order[:keep].sort().values, order[keep:]
    taken = rest[: int(0.3 * len(rest)) + 1]
    return torch.cat((x[kept], recycled(x[taken], int(len(taken) / 10) + 1)))


def recycled(points, clusters):
    """(C, D) means of density-peak clusters, the strongest peak first."""
    rows = [(point - points).square().sum(-1).sqrt() for point in points]
    distance = torch.stack(rows) / points.shape[1] ** 0.5
    near = distance.topk(clusters, largest=False).values
    density = (-near.square().mean(-1)).exp()
    apart = torch.full_like(density, float(distance.max()))
    for i in range(len(points)):
        denser = density > density[i]
        if denser.any():
            apart[i] = distance[i][denser].min()
    centers = (density * apart).topk(clusters).indices
    joined = distance[:, centers].argmin(1)
    joined[centers] = torch.arange(clusters)
    return torch.stack([points[joined == number].mean(0) for number in range(clusters)])


def inputs(v, batch, generator):
    """Random signals and states of a 7B model; states in heaps, as those of images are."""
    logits = torch.randn(batch, 1, HEADS, ASKED, v, generator=generator) * 2
    heaps = torch.randn(batch, 40, WIDTH, generator=generator)
    heap = torch.randint(40, (batch, v), generator=generator)
    size = torch.rand(batch, v, 1, generator=generator) + 0.3
    noise = torch.randn(batch, v, WIDTH, generator=generator)
    rows = torch.arange(batch)[:, None]
    return {
        "question_relevance": torch.randn(batch, ASKED, generator=generator).softmax(-1),
        "question_attention": logits.softmax(-1),
        "question_mask": torch.ones(batch, ASKED, dtype=torch.bool),
        "x": heaps[rows, heap] + noise * size / 2,
    }


def method(keep):
    """The method that keeps as many; recycled tokens come on top."""
    return SparseVLM(layers=(3,), keep=keep)


CASES = {"sparsevlm": (transcription, inputs, method)}
