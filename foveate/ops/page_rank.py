"""PageRank of attention maps: what tokens are worth to those that attend to them."""

from __future__ import annotations

import torch
from torch import Tensor


def page_rank(weights: Tensor, start: Tensor, rounds: int, there: Tensor | None = None) -> Tensor:
    """(b, H, N) what tokens are worth after rounds of votes: s <- A^T s.

    Args:
        weights: (b, H, N, N) attention; rows sum to one.
        start: (..., N) what each token's vote counts in the first round; only shares matter.
        rounds: how many.
        there: (b, 1, 1, N) 1 for tokens that take part, 0 for others, without which rows are normed
            again; `None` if all do.
    """
    votes = (start / start.sum(-1, keepdim=True)).expand_as(weights[:, :, :1])
    if there is None:
        for _ in range(rounds):
            votes = torch.matmul(votes, weights)
        return votes[:, :, 0]
    share = torch.matmul(there, weights.transpose(2, 3)).clamp(min=torch.finfo().tiny)
    into = there / share
    votes = votes * there
    for _ in range(rounds):
        votes = torch.matmul(votes * into, weights) * there
    return votes[:, :, 0]
