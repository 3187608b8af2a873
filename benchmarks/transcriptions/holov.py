"""HoloV, one image at a time, written from the definition, variance of cosines included."""

import torch
import torch.nn.functional as F

from foveate.methods.holov import HoloV


def transcription(tensors, keep, runs=16, alpha=0.09):
    """Kept positions; `x` is (V, D), `cls_attention` (1, H, V)."""
    seen = tensors["cls_attention"][0].mean(0) * 1e3
    parts = torch.arange(len(seen)).tensor_split(min(runs, len(seen)))
    score = torch.stack([_score(tensors["x"][part], seen[part], alpha) for part in parts])
    size = torch.tensor([len(part) for part in parts])
    given = torch.zeros(len(parts), dtype=torch.long)
    while (left := keep - int(given.sum())) > 0:
        room = size - given
        share = torch.where(room > 0, score, 0)
        more = (share / share.sum() * left).floor().long()
        heaviest = [i for i in score.argsort(descending=True).tolist() if room[i] > 0]
        more[heaviest[: left - int(more.sum())]] += 1
        given += torch.minimum(more, room)
    best = [
        part[seen[part].argsort(descending=True, stable=True)[:count]]
        for part, count in zip(parts, given.tolist(), strict=True)
    ]
    return torch.cat(best).sort().values


def _score(x, seen, alpha):
    """Of a run: attention, and variance of cosines scaled to it."""
    count = len(x)
    if count == 1:
        return seen.mean()
    x = F.normalize(x, dim=-1)
    like = (x @ x.T).fill_diagonal_(0)
    mean = like.sum(1, keepdim=True) / (count - 1)
    variance = ((like - mean) ** 2).sum(1) / (count - 1)
    return (seen + alpha * variance * seen.mean() / (variance.mean() + 1e-6)).mean()


def inputs(v, batch, generator):
    """Random tokens of a 7B model, and attention of a class token that sees itself too."""
    attention = torch.randn(batch, 1, 16, v, generator=generator).softmax(-1) * 0.9
    return {"x": torch.randn(batch, v, 4096, generator=generator), "cls_attention": attention}


def method(keep):
    """The method that keeps as many."""
    return HoloV(keep=keep)


CASES = {"holov": (transcription, inputs, method)}
