"""Attention of the vision encoder's class token, from the projections the encoder computes anyway.

softmax(q_cls K^T / sqrt(d)) needs one query row: O(N D) per layer instead of O(N^2 D) for an
attention map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def class_row(
    query: Tensor, key: Tensor, heads: int, special: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Attention of row 0 to the patches.

    Args:
        query: (B, S + V, D) projected queries; only row 0 is read.
        key: (B, S + V, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1 or H, 1 or S + V, S + V) what the encoder adds to the scores.

    Returns:
        (B, H, V) float32 probabilities over all S + V keys, without the columns of the first S.
    """
    batch, length, width = key.shape
    q = query[:, :1].view(batch, 1, heads, -1).transpose(1, 2)
    k = key.view(batch, length, heads, -1).transpose(1, 2)
    logits = torch.matmul(q, k.transpose(-1, -2))[:, :, 0].float() / math.sqrt(width // heads)
    if bias is not None:
        logits = logits + bias[:, :, 0]
    return logits.softmax(-1)[..., special:]
