"""Rotary positions of encoders whose images are rows of a batch: of patches, or of all rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None, heads: int) -> Tensor:
    """(B, N, H d) queries or keys as attention multiplies them.

    Args:
        x: (B, N, H d) as they are projected.
        rotary: (V, d) or (B, 1, V, d) cosines and sines of the last V rows; `None` for none.
        heads: H.
    """
    if rotary is None:
        return x
    cos, sin = rotary
    parts = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    special, patches = parts.tensor_split([x.shape[1] - cos.shape[-2]], 2)
    first, second = patches.chunk(2, -1)
    patches = patches * cos + torch.cat((-second, first), -1) * sin  # which may be wider than x
    return torch.cat((special, patches.to(x.dtype)), 2).transpose(1, 2).flatten(2)


def rotated_class(
    query: Tensor, rotary: tuple[Tensor, Tensor] | None, heads: int, length: int
) -> Tensor:
    """(B, 1, H d) the query of row 0 as attention multiplies it.

    Args:
        query: (B, 1, H d) as it is projected.
        rotary: as in `rotated`.
        heads: H.
        length: N.
    """
    if rotary is None or rotary[0].shape[-2] < length:
        return query
    cos, sin = (part[..., :1, :] for part in rotary)
    return rotated(query, (cos, sin), heads)
