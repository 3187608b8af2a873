"""Attention that shows its maps while it is computed, a few images at a time.

What a method wants to know of a layer's attention costs it a second map, unless it computes the
attention itself. Then a map is made once, looked at, multiplied with the values and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import LayerAttention

HELD = {"cpu": 1 << 19}  # entries of maps held at once: what a cache holds
HELD_ELSEWHERE = 1 << 26


def attend_with_maps(layer: LayerAttention, look: Callable[[Tensor], Tensor]) -> Tensor:
    """The attention of a layer.

    Args:
        layer: its queries, keys and values.
        look: is handed (b, H, N, N) maps, image after image, and returns what values are weighted
            with: the same, or changed ones.

    Returns:
        (B, N, H, d).
    """
    mixed = [
        torch.matmul(F.dropout(look(weights), layer.dropout), value)
        for weights, value in _maps(layer)
    ]
    return torch.cat(mixed).transpose(1, 2)


def _maps(layer: LayerAttention) -> Iterator[tuple[Tensor, Tensor]]:
    """(b, H, N, N) attention in float32 or better, cast as values are, and (b, H, N, d) values."""
    images, heads, rows, _ = layer.query.shape
    held = HELD.get(layer.query.device.type, HELD_ELSEWHERE)
    step = max(held // (heads * rows * rows), 1)
    bias = layer.bias
    for start in range(0, images, step):
        query, key, value = (
            part[start : start + step] for part in (layer.query, layer.key, layer.value)
        )
        scores = torch.matmul(query * layer.scaling, key.transpose(2, 3))
        if bias is not None:
            scores = scores + (bias if len(bias) == 1 else bias[start : start + step])
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        yield weights.to(value.dtype), value
