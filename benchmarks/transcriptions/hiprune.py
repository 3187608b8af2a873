"""HiPrune, one image at a time, written from the paper's definition."""

import torch

from foveate.methods.hiprune import HiPrune


def transcription(tensors, keep, alpha=0.1):
    """Kept positions of (2, V) `received_attention` in object and last layer, on a square grid."""
    objects, deep = tensors["received_attention"]
    total = len(deep)
    side = int(total**0.5)
    anchors = objects.argsort(descending=True)[: round(keep * alpha / 5)].tolist()
    near = set(anchors)
    for anchor in anchors:
        row, column = divmod(anchor, side)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < side and 0 <= c < side:
                near.add(r * side + c)
    left = deep.clone()
    left[list(near)] = -torch.inf
    registers = left.argsort(descending=True)[: keep - len(near)].tolist()
    return torch.tensor(sorted(near | set(registers)))


def inputs(v, batch, generator):
    """Random attention received in two layers, on the largest square grid of at most v tokens."""
    total = int(v**0.5) ** 2
    scores = torch.randn(batch, 2, total, generator=generator)
    return {"received_attention": scores.softmax(-1) * 0.9}


def method(keep):
    """The method that keeps as many."""
    return HiPrune(keep=keep)


CASES = {"hiprune": (transcription, inputs, method)}
