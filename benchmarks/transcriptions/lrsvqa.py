"""LRS-VQA's ranking in a session, one image at a time, written from the definition."""

import torch

from foveate.methods.lrsvqa import LRSVQA


def transcription(tensors, keep):
    """Kept positions; the signal of one image is (1, H, V)."""
    heads = tensors["text_attention"][0]
    scores = torch.zeros(heads.shape[-1])
    for head in heads:
        scores += head / head.sum() / len(heads)
    return scores.topk(keep).indices.sort().values


def inputs(v, batch, generator):
    """Attention of one text token among v visual and some text tokens, 32 heads."""
    logits = 2 * torch.randn(batch, 32, v + 64, generator=generator)
    return {"text_attention": logits.softmax(-1)[:, None, :, :v]}


def method(keep):
    """The method that keeps as many."""
    return LRSVQA(keep=keep)


CASES = {"lrs-vqa": (transcription, inputs, method)}
