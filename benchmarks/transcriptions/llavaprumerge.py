"""LLaVA-PruMerge and PruMerge+, one image at a time, written from the definition."""

from functools import partial

import torch

from foveate.methods.llavaprumerge import LLaVAPruMerge


def transcription(tensors, keep, plus=True):
    """(K, D) survivors in the order of their choice, and the token for the dropped ones.

    `joint_cls_attention` is (1, V), `encoder_keys` (1, H, V, d) and `x` (V, D). The attention
    decides how many survive, not `keep`.
    """
    attention, x = tensors["joint_cls_attention"][0], tensors["x"]
    keys = tensors["encoder_keys"][0].transpose(0, 1).flatten(1)
    total = len(x)
    low, high = attention.quantile(torch.tensor([0.25, 0.75]))
    count = int((attention > high + 1.5 * (high - low)).sum())
    kept = attention.argsort(descending=True)[:count].tolist()
    if plus:
        stride = total // count // 3
        kept += [i for i in range(0, total, stride) if i not in set(kept)]
    values = []
    for i in kept:
        others = torch.cat((torch.arange(i), torch.arange(i + 1, total)))
        cosine = torch.cosine_similarity(keys[i][None], keys[others])
        nearest = others[cosine.topk(32).indices]
        values.append(x[i] + attention[nearest] @ x[nearest])
    dropped = torch.ones(total, dtype=torch.bool)
    dropped[kept] = False
    return torch.stack([*values, attention[dropped] @ x[dropped]])


def inputs(v, batch, generator):
    """Random keys of a CLIP ViT-L, tokens of a 7B model, and an outlier among 18 patches."""
    attention = torch.rand(batch, v, generator=generator)
    attention[:, torch.randperm(v, generator=generator)[: v // 18]] += 1000
    return {
        "joint_cls_attention": (attention / attention.sum(-1, keepdim=True))[:, None],
        "encoder_keys": torch.randn(batch, 1, 16, v, 64, generator=generator),
        "x": torch.randn(batch, v, 4096, generator=generator),
    }


def method(keep, plus=True):
    """The method; it decides by itself how many survive."""
    return LLaVAPruMerge(plus=plus)


CASES = {
    "llava-prumerge": (partial(transcription, plus=False), inputs, partial(method, plus=False)),
    "llava-prumerge, plus": (transcription, inputs, method),
}
