"""HoliTom's inner merging, one image at a time, written from the paper's definition."""

import torch
import torch.nn.functional as F

from foveate.methods.holitom_inner import HoliTomInner

HEADS, WIDTH = 28, 3584


def transcription(tensors, keep):
    """(K, D) survivors in raster order; `text_attention` is (1, H, V) and `x` (V, D)."""
    x = tensors["x"].clone()
    kept = tensors["text_attention"][0].mean(0).topk(keep).indices.sort().values
    dropped = torch.ones(len(x), dtype=torch.bool)
    dropped[kept] = False
    unit = F.normalize(x, dim=-1)
    states = x[kept]
    for position in dropped.nonzero()[:, 0]:
        target = int((unit[kept] @ unit[position]).argmax())
        states[target] = (states[target] + x[position]) / 2
    return states


def inputs(v, batch, generator):
    """Random signals and states of a 7B model."""
    logits = torch.randn(batch, 1, HEADS, v, generator=generator) * 2
    return {
        "text_attention": logits.softmax(-1),
        "x": torch.randn(batch, v, WIDTH, generator=generator),
    }


def method(keep):
    """The method that keeps as many."""
    return HoliTomInner(keep=keep)


CASES = {"holitom-inner": (transcription, inputs, method)}
