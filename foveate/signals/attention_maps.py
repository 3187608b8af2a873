"""Sums over attention maps of an encoder layer, whose rows are never held together.

Shapes: `B` images, `S` special tokens before the `V` patches, `N = S + V`, `H` heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 256  # query rows whose attention is held at once


@torch.no_grad()
def attention_sums(
    query: Tensor, key: Tensor, heads: int, special: int = 1, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that patches receive and give, averaged over heads.

    Args:
        query: (B, N, D) projected queries.
        key: (B, N, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1, 1, N) what the encoder adds to the scores.

    Returns:
        (B, V) mean over all N queries that the encoder does not hide of what each patch receives,
        and (B, V) the share of its attention that each patch gives to patches; float32.
    """
    received, given = torch.zeros(key.shape[:2], device=key.device), []
    for weights in _maps(query, key, heads, bias):
        received += weights.sum(1)
        given.append(weights[..., special:].sum(-1))
    return received[:, special:] / queries(key, bias), torch.cat(given, 1)[:, special:]


def queries(key: Tensor, bias: Tensor | None) -> Tensor | int:
    """(B, 1) how many of (B, N, D) rows are queries: those that the encoder's bias shows."""
    seen = _visible(bias)
    return key.shape[1] if seen is None else seen.sum(1, keepdim=True)


def _visible(bias: Tensor | None) -> Tensor | None:
    """(B, N) rows that a bias (B, 1, 1, N) does not hide; `None` for all."""
    return None if bias is None else bias[:, 0, 0] > torch.finfo(bias.dtype).min / 2


@torch.no_grad()
def global_attention(
    query: Tensor,
    key: Tensor,
    heads: int,
    special: int = 1,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Attention that patches receive from global rows, averaged over these and over heads.

    Source: VFlowOpt, arXiv:2508.05211.

    Args:
        query: (B, N, D) projected queries.
        key: (B, N, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1, 1, N) what the encoder adds to the scores.
        threshold: a row is global if it receives more than so many times the mean; without any such
            row all are.

    Returns:
        (B, V) float32.
    """
    received = sum(weights.sum(1) for weights in _maps(query, key, heads, bias))
    assert isinstance(received, Tensor)  # there is at least one row
    votes = received > threshold * (received.sum(1, keepdim=True) / queries(key, bias))
    everybody = torch.ones_like(votes) if (seen := _visible(bias)) is None else seen
    votes |= ~votes.any(1, keepdim=True) & everybody
    share = (votes / votes.sum(1, keepdim=True)).float().split(CHUNK, dim=1)
    maps = _maps(query, key, heads, bias)
    given = sum(torch.bmm(s[:, None], w)[:, 0] for s, w in zip(share, maps, strict=True))
    assert isinstance(given, Tensor)
    return given[:, special:]


def _maps(query: Tensor, key: Tensor, heads: int, bias: Tensor | None) -> Iterator[Tensor]:
    """(B, n, N) float32 attention of a chunk of rows after another, mean over heads; rows that the
    encoder hides give none.
    """
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2) / math.sqrt(query.shape[-1] // heads)
    k = key.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    seen = _visible(bias)
    for start in range(0, q.shape[2], CHUNK):
        logits = torch.matmul(q[:, :, start : start + CHUNK], k).float()
        weights = (logits if bias is None else logits + bias).softmax(-1).mean(1)
        yield weights if seen is None else weights * seen[:, start : start + CHUNK, None]
