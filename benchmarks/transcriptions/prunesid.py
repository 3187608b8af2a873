"""PruneSID, one image at a time, written from the definition."""

import math

import torch
import torch.nn.functional as F

from foveate.methods.prunesid import PruneSID


def transcription(tensors, keep):
    """Kept positions; `encoder_features` is (1, V, C), `cls_attention` (1, H, V)."""
    x, seen = tensors["encoder_features"][0], tensors["cls_attention"][0].mean(0).tolist()
    groups = max(keep // 4, 1)
    samples = x.double().sigmoid()
    samples = samples - samples.mean(1, keepdim=True)
    vectors = torch.linalg.svd(samples, full_matrices=False).U[:, :groups]
    group = vectors.abs().argmax(1).tolist()
    unit = F.normalize(x, dim=-1)
    like = unit @ unit.T
    total = len(x)
    threshold = keep / 32 * float(like.triu(1).sum() / max(total * (total - 1) / 2, 1))
    members = [[i for i in range(total) if group[i] == g] for g in range(groups)]
    ranked, fresh = [], []
    for own in members:
        own.sort(key=lambda i: -seen[i])
        kept = []
        for i in own:
            if all(float(like[i, j]) <= threshold for j in kept):
                kept.append(i)
        ranked.append([*kept, *(i for i in own if i not in kept)])
        fresh.append(len(kept))
    quota = _quotas([len(own) for own in members], fresh, keep)
    return torch.tensor(sorted(i for own, n in zip(ranked, quota, strict=True) for i in own[:n]))


def _quotas(size, fresh, keep):
    most = [min(n, f, 5 * math.ceil(keep / 64)) for n, f in zip(size, fresh, strict=True)]
    while sum(most) < keep:
        most = [min(m + 1, n) for m, n in zip(most, size, strict=True)]
    quota = [min(1, n) for n in size]
    rest, before, seen = keep - sum(quota), 0, 0
    for g, f in enumerate(fresh):
        seen += f
        now = round(seen * rest / sum(fresh))
        quota[g], before = min(quota[g] + now - before, most[g]), now
    for g in sorted(range(len(fresh)), key=lambda g: -fresh[g]):
        quota[g] += min(most[g] - quota[g], keep - sum(quota))
    return quota


def inputs(v, batch, generator):
    """Random features of CLIP, and attention of a class token that sees itself too."""
    attention = torch.randn(batch, 1, 16, v, generator=generator).softmax(-1) * 0.9
    features = torch.randn(batch, 1, v, 1024, generator=generator) + 0.3
    return {"encoder_features": features, "cls_attention": attention}


def method(keep):
    """The method that keeps as many."""
    return PruneSID(keep=keep)


CASES = {"prunesid": (transcription, inputs, method)}
