"""SCOPE, one image at a time, written from the paper's definition."""

import torch
import torch.nn.functional as F

from foveate.methods.scope import SCOPE


def transcription(tensors, keep, alpha=1.0):
    """Kept positions; `x` is (V, D), `cls_attention` (1, H, V)."""
    x = F.normalize(tensors["x"], dim=-1)
    like = x @ x.T
    weight = (tensors["cls_attention"][0] / tensors["cls_attention"][0].sum(-1, keepdim=True)).mean(
        0
    ) ** alpha
    covered = torch.zeros(len(x))
    picked = []
    while len(picked) < keep:
        gain = (like - covered[:, None]).clamp(min=0).sum(0) * weight
        gain[picked] = -torch.inf
        picked.append(int(gain.argmax()))
        covered = torch.maximum(covered, like[picked[-1]])
    return torch.tensor(sorted(picked))


def inputs(v, batch, generator):
    """Random tokens of a 7B model, and attention of a class token that sees itself too."""
    attention = torch.randn(batch, 1, 16, v, generator=generator).softmax(-1) * 0.9
    return {"x": torch.randn(batch, v, 4096, generator=generator), "cls_attention": attention}


def method(keep):
    """The method that keeps as many."""
    return SCOPE(keep=keep)


CASES = {"scope": (transcription, inputs, method)}
