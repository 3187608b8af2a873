"""CATP's first choice, one image at a time, written from the definition in its module."""

import torch
import torch.nn.functional as F

from foveate.methods.catp import CATP

ASKED, WIDTH = 60, 4096


def transcription(tensors, keep):
    """Kept positions, ascending; `x` is (V, D) and `question_embeddings` (Q, D)."""
    unit = F.normalize(tensors["x"], dim=-1)
    text = F.normalize(tensors["question_embeddings"][tensors["paired_mask"]], dim=-1)
    aligned = (unit @ text.T).mean(1)
    aligned = (aligned - aligned.min()) / (aligned.max() - aligned.min())
    distance = 1 - unit @ unit.T
    picked = [int(aligned.argmax())]
    while len(picked) < keep:
        nearest = distance[picked].min(0).values
        worth = 0.5 * aligned + 0.25 * nearest
        worth[picked] = -torch.inf
        picked.append(int(worth.argmax()))
    return torch.tensor(sorted(picked))


def inputs(v, batch, generator):
    """Random tokens and text embeddings of a 7B model."""
    return {
        "x": torch.randn(batch, v, WIDTH, generator=generator),
        "question_embeddings": torch.randn(batch, ASKED, WIDTH, generator=generator),
        "paired_mask": torch.ones(batch, ASKED, dtype=torch.bool),
    }


def method(keep):
    """The method that keeps as many."""
    return CATP(keep=keep)


CASES = {"catp": (transcription, inputs, method)}
