"""FoPru's rank strategy, one image at a time, written from the definition."""

import torch

from foveate.methods.fopru import FoPru


def transcription(tensors, keep):
    """Kept positions; signals of one image are (1, V), and (1, H, V) for the class token."""
    total = tensors["received_attention"].shape[-1]
    mean = tensors["received_attention"][0]
    first = tensors["cls_attention"][0].mean(0)
    received = (mean * (total + 1) - first) / total  # over the patches' rows only
    given = tensors["given_attention"][0] / total
    scores = received if received.var() > given.var() else given
    return scores.argsort(descending=True)[:keep].sort().values


def inputs(v, batch, generator):
    """Sums of the random attention of one layer over v patches and a class token."""
    logits = torch.randn(batch, v + 1, v + 1, generator=generator)
    logits += 2 * torch.randn(batch, 1, v + 1, generator=generator)
    attention = logits.softmax(-1)
    return {
        "received_attention": attention.mean(1)[:, None, 1:],
        "given_attention": attention[:, 1:, 1:].sum(-1)[:, None],
        "cls_attention": attention[:, None, :1, 1:].expand(-1, 1, 16, -1),
    }


def method(keep):
    """The method that keeps as many."""
    return FoPru(keep=keep)


CASES = {"fopru": (transcription, inputs, method)}
