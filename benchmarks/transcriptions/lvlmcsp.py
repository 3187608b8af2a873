"""LVLM_CSP's last phase, one image at a time, written from the abstract's definition."""

import torch

from foveate.methods.lvlmcsp import LVLMCSP

HEADS = 32


def transcription(tensors, keep):
    """Kept positions, ascending; `text_attention` is (1, H, V)."""
    return tensors["text_attention"][0].mean(0).argsort(descending=True)[:keep].sort().values


def inputs(v, batch, generator):
    """Random attention of a 7B model's last prompt token."""
    logits = torch.randn(batch, 1, HEADS, v, generator=generator) * 2
    return {"text_attention": logits.softmax(-1)}


def method(keep):
    """The method that keeps as many at the end."""
    return LVLMCSP(keep=keep)


CASES = {"lvlm-csp": (transcription, inputs, method)}
