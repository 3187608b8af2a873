"""VisionZip, one image at a time, written from the paper's definition."""

import torch

from foveate.methods.visionzip import VisionZip


def transcription(tensors, keep):
    """(K, D) dominant tokens in raster order, then contextual ones.

    `cls_attention` is (1, H, V), `encoder_keys` (1, H, V, d) and `x` (V, D).
    """
    x = tensors["x"]
    contextual = round(keep * 5 / 32)
    scores = tensors["cls_attention"][0].sum(0)
    dominant = torch.zeros(len(scores), dtype=torch.bool)
    dominant[scores.topk(keep - contextual).indices] = True
    keys = tensors["encoder_keys"][0].mean(0)[~dominant]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    rest = x[~dominant]
    step = max(1, len(rest) // contextual)
    targets = torch.arange(0, len(rest), step)[:contextual]
    other = torch.ones(len(rest), dtype=torch.bool)
    other[targets] = False
    best = (keys[other] @ keys[targets].T).argmax(1)
    one_hot = torch.nn.functional.one_hot(best, contextual).to(x.dtype)
    counts = one_hot.sum(0).clamp(min=1)[:, None]
    return torch.cat((x[dominant], rest[targets] + one_hot.T @ rest[other] / counts))


def inputs(v, batch, generator):
    """Random signals of a CLIP ViT-L and tokens of a 7B model."""
    return {
        "cls_attention": torch.rand(batch, 1, 16, v, generator=generator),
        "encoder_keys": torch.randn(batch, 1, 16, v, 64, generator=generator),
        "x": torch.randn(batch, v, 4096, generator=generator),
    }


def method(keep):
    """The method that keeps as many."""
    return VisionZip(keep=keep)


CASES = {"visionzip": (transcription, inputs, method)}
