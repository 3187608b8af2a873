"""VisPruner, one image at a time, written from the paper's definition."""

import torch
import torch.nn.functional as F

from foveate.methods.vispruner import VisPruner


def transcription(tensors, keep, important_ratio=0.5):
    """Kept positions; `x` is (V, D), `cls_attention` (1, H, V)."""
    heads = tensors["cls_attention"][0]
    seen = (heads / heads.sum(-1, keepdim=True)).mean(0)
    important = round(keep * important_ratio)
    if keep > 1:
        important = min(important, keep - 1)
    kept = set(seen.argsort(descending=True, stable=True)[:important].tolist())
    rest = [i for i in range(len(seen)) if i not in kept]
    x = F.normalize(tensors["x"], dim=-1)
    while keep > important and (over := len(rest) - (keep - important)) > 0:
        first, second = rest[::2], rest[1::2]
        nearest = (x[first] @ x[second].T).amax(-1)
        order = nearest.argsort(descending=True, stable=True)
        drop = {first[i] for i in order[: min(8, len(rest) // 2, over)].tolist()}
        rest = [i for i in rest if i not in drop]
    return torch.tensor(sorted([*kept, *rest] if keep > important else kept))


def inputs(v, batch, generator):
    """Random tokens of a 7B model, and attention of a class token that sees itself too."""
    attention = torch.randn(batch, 1, 16, v, generator=generator).softmax(-1) * 0.9
    return {"x": torch.randn(batch, v, 4096, generator=generator), "cls_attention": attention}


def method(keep):
    """The method that keeps as many."""
    return VisPruner(keep=keep)


CASES = {"vispruner": (transcription, inputs, method)}
