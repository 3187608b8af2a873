"""Signals of decoder layers."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def transition(given: Tensor, made: Tensor, real: Tensor) -> Tensor:
    """How much a module changes its tokens: relative size of what it makes, times a softmax of how
    far that points away.

    Source: TransPrune, arXiv:2507.20630, the transition variation of one module.

    Args:
        given: (B, P, D) input of the module.
        made: (B, P, D) output, before the residual sum.
        real: (B, P) columns that are no padding; the softmax runs over those of the row.

    Returns:
        (B, P) float32.
    """
    given, made = given.detach().float(), made.detach().float()
    size = made.norm(dim=-1) / given.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    turned = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
    return size * turned.masked_fill(~real, -torch.inf).softmax(-1)
