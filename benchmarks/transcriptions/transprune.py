"""TransPrune's ranking at its last drop, one image at a time, written from the paper's definition.

Signals are given: transitions of six layers, and the attention of 60 text tokens.
"""

import torch

from foveate.methods.transprune import TransPrune

HEADS, LAYERS, ASKED = 32, 6, 60


def transcription(tensors, keep):
    """Kept positions, ascending; `transition` is (L, V), `question_attention` (1, H, Q, V)."""
    changed = torch.zeros(tensors["transition"].shape[1])
    for layer in tensors["transition"]:
        changed = changed + layer
    attention = tensors["question_attention"][0].mean(0)
    seen = attention[tensors["question_mask"]].mean(0)
    changed = changed / (changed.sum() + 1e-8)
    seen = seen / (seen.sum() + 1e-8)
    return (changed + seen).topk(keep).indices.sort().values


def inputs(v, batch, generator):
    """Random signals of a 7B model."""
    logits = torch.randn(batch, 1, HEADS, ASKED, v, generator=generator) * 2
    return {
        "transition": torch.rand(batch, LAYERS, v, generator=generator),
        "question_attention": logits.softmax(-1),
        "question_mask": torch.ones(batch, ASKED, dtype=torch.bool),
    }


def method(keep):
    """The method that keeps as many."""
    return TransPrune(layers=(7,), keep=keep)


CASES = {"transprune": (transcription, inputs, method)}
