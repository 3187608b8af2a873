"""CDPruner, one image at a time, written from the paper's definition of relevance and kernel and
the textbook form of greedy inference.
"""

import torch
import torch.nn.functional as F

from foveate.methods.cdpruner import CDPruner

TEXT = 64  # tokens of the question


def transcription(tensors, keep):
    """Kept positions, ascending. `x` is (V, D), `question_embeddings` (Q, D)."""
    x = F.normalize(tensors["x"], dim=-1)
    text = F.normalize(tensors["question_embeddings"], dim=-1)
    relevance = (x @ text.T).mean(-1)
    low, high = relevance.min(), relevance.max()
    relevance = (relevance - low + 1e-6) / (high - low)
    kernel = relevance[:, None] * (x @ x.T) * relevance
    rest = kernel.diagonal().clone()
    factors = torch.zeros(keep, len(x))
    picked = []
    for step in range(keep):
        pick = int(rest.argmax())
        picked.append(pick)
        row = kernel[pick] - factors[:step, pick] @ factors[:step]
        factors[step] = row / rest[pick].sqrt()
        rest = rest - factors[step] ** 2
        rest[pick] = -torch.inf
    return torch.tensor(sorted(picked))


def inputs(v, batch, generator):
    """Random tokens and text embeddings of a 7B model."""
    return {
        "x": torch.randn(batch, v, 4096, generator=generator),
        "question_embeddings": torch.randn(batch, TEXT, 4096, generator=generator),
        "question_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


def method(keep):
    """The method that keeps as many."""
    return CDPruner(keep=keep)


CASES = {"cdpruner": (transcription, inputs, method)}
