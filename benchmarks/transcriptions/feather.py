"""FEATHER's first drop, one image at a time, written from the paper's definition."""

import math

import torch

from foveate.methods.feather import Feather

HEADS = 32


def transcription(tensors, keep):
    """Kept positions, ascending; `content_attention` is (1, H, V)."""
    scores = tensors["content_attention"][0].mean(0)
    side = math.isqrt(len(scores))
    width = side if side * side == len(scores) else len(scores)  # a square, or one row
    chosen = set(scores.topk(keep).indices.tolist())
    for position in range(len(scores)):
        if position // width % 3 == 0 and position % width % 3 == 0:
            chosen.add(position)
    return torch.tensor(sorted(chosen))


def inputs(v, batch, generator):
    """Random signals of a 7B model."""
    logits = torch.randn(batch, 1, HEADS, v, generator=generator) * 2
    return {"content_attention": logits.softmax(-1)}


def method(keep):
    """The method whose attention keeps as many; the grid comes on top."""
    return Feather(keep=keep)


CASES = {"feather": (transcription, inputs, method)}
