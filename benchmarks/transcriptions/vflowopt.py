"""VFlowOpt's first step, one image at a time, written from the paper's definition: the lowest
ranked tokens are pooled, and those of one cell become one, their mean weighted by score.
"""

import math

import torch

from foveate.methods.vflowopt import VFlowOpt

SHARE, CELL = 0.25, 15.581


def transcription(tensors, keep):
    """(K, D) tokens of the image, the recycled ones at the best of their cell.

    `global_attention` is (1, V) and `x` (V, D); the share decides how many go, not `keep`.
    """
    scores, x = tensors["global_attention"][0], tensors["x"]
    total = len(scores)
    side = math.isqrt(total)
    width = side if side * side == total else total  # a square, or one row
    pool = round(total * (1 - SHARE)) + int(total / CELL**2)
    order = scores.argsort().tolist()
    heaps = {}
    for position in order[:pool]:
        cell = int(position // width / CELL), int(position % width / CELL)
        heaps.setdefault(cell, []).append(position)
    found = {position: x[position] for position in order[pool:]}
    for heap in heaps.values():
        weights = scores[heap] / scores[heap].sum()
        found[heap[-1]] = weights @ x[heap]  # the last has the highest score
    return torch.stack([found[position] for position in sorted(found)])


def inputs(v, batch, generator):
    """Random attention of one layer, and tokens of a 7B model."""
    return {
        "global_attention": torch.rand(batch, 1, v, generator=generator) / v,
        "x": torch.randn(batch, v, 3584, generator=generator),
    }


def method(keep):
    """The method's first step at the share that the transcription keeps."""
    return VFlowOpt(keep=SHARE, cell=CELL)


CASES = {"vflowopt": (transcription, inputs, method)}
