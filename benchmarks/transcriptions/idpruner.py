"""IDPruner, one image at a time, written from the paper's definition."""

import torch
import torch.nn.functional as F

from foveate.methods.idpruner import IDPruner


def transcription(tensors, keep, mmr_lambda=0.5):
    """Kept positions; `x` is (V, D), `cls_attention` (1, H, V)."""
    heads = tensors["cls_attention"][0]
    seen = (heads / heads.sum(-1, keepdim=True)).mean(0)
    importance = (seen - seen.min()) / (seen.max() - seen.min())
    x = F.normalize(tensors["x"], dim=-1)
    like = x @ x.T
    picked = [int(importance.argmax())]
    while len(picked) < keep:
        score = mmr_lambda * importance - (1 - mmr_lambda) * like[picked].amax(0)
        score[picked] = -torch.inf
        picked.append(int(score.argmax()))
    return torch.tensor(sorted(picked))


def inputs(v, batch, generator):
    """Random tokens of a 7B model, and attention of a class token that sees itself too."""
    attention = torch.randn(batch, 1, 16, v, generator=generator).softmax(-1) * 0.9
    return {"x": torch.randn(batch, v, 4096, generator=generator), "cls_attention": attention}


def method(keep):
    """The method that keeps as many."""
    return IDPruner(keep=keep)


CASES = {"idpruner": (transcription, inputs, method)}
