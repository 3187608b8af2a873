"""DART, one image at a time, written from the paper's definition: each pivot in turn is compared
with every token that is left.
"""

import torch
import torch.nn.functional as F

from foveate.methods.dart import DART

PIVOTS, TEXT = 4, 64  # pivots of each kind, tokens of the question


def transcription(tensors, keep):
    """Kept positions, ascending.

    `llm_keys` and `question_keys` are (1, H, N, d), `normed_states` and `question_normed_states`
    (1, N, D).
    """
    states, text_states = tensors["normed_states"][0], tensors["question_normed_states"][0]
    own = tensors["llm_keys"][0].transpose(0, 1).flatten(1).norm(p=1, dim=-1).topk(PIVOTS).indices
    text_keys = tensors["question_keys"][0].transpose(0, 1).flatten(1)
    asked = text_keys.norm(p=1, dim=-1).topk(PIVOTS).indices
    kept = own.tolist()
    picks = keep - len(kept)
    left = [i for i in range(len(states)) if i not in kept]
    pivots = [states[i] for i in own] + [text_states[i] for i in asked]
    for number, pivot in enumerate(pivots):
        quota = picks // len(pivots) + (number < picks % len(pivots))
        likeness = F.cosine_similarity(pivot[None], states[left], dim=-1)
        chosen = [left[i] for i in (-likeness).topk(quota).indices.tolist()]
        kept += chosen
        left = [i for i in left if i not in chosen]
    return torch.tensor(sorted(kept))


def inputs(v, batch, generator):
    """Random states and keys of a 7B model."""

    def random(*shape):
        return torch.randn(batch, 1, *shape, generator=generator)

    return {
        "llm_keys": random(32, v, 128),
        "question_keys": random(32, TEXT, 128),
        "normed_states": random(v, 4096),
        "question_normed_states": random(TEXT, 4096),
        "question_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


def method(keep):
    """The method that keeps as many."""
    return DART(keep=keep)


CASES = {"dart": (transcription, inputs, method)}
