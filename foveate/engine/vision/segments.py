"""Segments: what layers are told about rows of images that follow one another, or are padded.

Boundaries of segments are counts of rows, rotary embeddings and block masks have one entry for each
row. Once rows have been removed, all of them are translated by the rows that remain, once for all
layers that are told the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# boundaries of segments -> the longest segment, as kernels with segments are told both
BOUNDARIES = {
    "cu_seqlens": "max_seqlen",
    "cu_seq_lens_q": "max_length_q",
    "cu_seq_lens_k": "max_length_k",
}


def boundaries(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Boundaries of segments that a layer is told, if it is."""
    return next((kwargs[name] for name in BOUNDARIES if kwargs.get(name) is not None), None)


class PackedRows:
    """The translation for the rows that remain.

    Args:
        order: (N) which of all rows each row of now is, ascending.
        bias: (N) what the scores of each key get, for layers that take a mask.
    """

    def __init__(self, order: Tensor, bias: Tensor | None = None) -> None:
        self._order = order
        self._bias = bias
        self._done: dict[int, tuple[Tensor, Tensor]] = {}  # holds on to what was translated

    def translate(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a layer, for the rows that remain."""
        changed = dict(kwargs)
        if (rotary := kwargs.get("position_embeddings")) is not None:
            changed["position_embeddings"] = tuple(self._once(part, self._rows) for part in rotary)
        if (mask := kwargs.get("attention_mask")) is not None:
            changed["attention_mask"] = self._once(mask, self._block)
        for name, longest in BOUNDARIES.items():
            if (bounds := kwargs.get(name)) is None:
                continue
            changed[name] = self._once(bounds, self._boundaries)
            if kwargs.get(longest) is not None:
                changed[longest] = int(changed[name].diff().max())
        return changed

    def _once(self, given: Tensor, translate: Callable[[Tensor], Tensor]) -> Tensor:
        if id(given) not in self._done:
            self._done[id(given)] = given, translate(given)
        return self._done[id(given)][1]

    def _rows(self, rotary: Tensor) -> Tensor:
        return rotary.index_select(-2, self._order.to(rotary.device))

    def _boundaries(self, bounds: Tensor) -> Tensor:
        """How many rows remain before each boundary, without segments of which none does."""
        remaining = torch.searchsorted(self._order, bounds.to(self._order))
        return remaining.unique_consecutive().to(bounds)

    def _block(self, mask: Tensor) -> Tensor:
        """(1, 1, N, N) of a mask that keeps images apart."""
        order = self._order.to(mask.device)
        mask = mask.index_select(-2, order).index_select(-1, order)
        if self._bias is None:
            return mask
        if mask.dtype == torch.bool:
            return torch.where(mask, self._bias, torch.finfo(self._bias.dtype).min)
        return (mask + self._bias).clamp(min=torch.finfo(mask.dtype).min)


class PaddedRows:
    """The translation for images that are rows of a batch with padding; masks are made elsewhere.

    Args:
        rows: (B, N') which row of its image each row of now is; any for padding.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def translate(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a layer, for the rows that remain."""
        changed = dict(kwargs)
        if (rotary := kwargs.get("position_embeddings")) is not None:
            changed["position_embeddings"] = tuple(map(self._take, rotary))
        if (places := kwargs.get("position_ids")) is not None:
            changed["position_ids"] = self._take(places)
        return changed

    def _take(self, given: Tensor) -> Tensor:
        """(B, N', d) of (B, N, d)."""
        index = self._rows.to(given.device)[..., None].expand(-1, -1, given.shape[-1])
        return given.gather(1, index)


class BatchRows:
    """The translation for images that are rows of a batch, whose rows have rotary positions or
    numbers.

    Args:
        rows: (B, N') which row of its image each row of now is; any for padding.
        special: rows before the patches, which may have no positions.
        patches: patches of an image, V.
        places: what layers are handed as the numbers of rows; empty where they take none.
    """

    def __init__(self, rows: Tensor, special: int, patches: int, places: str) -> None:
        self._rows = rows
        self._special = special
        self._patches = patches
        self._places = places

    def translate(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a layer, for the rows that remain: (B, 1, K, d) of (V, d), or
        (B, 1, N', d) of (N, d).
        """
        changed, rows = dict(kwargs), self._rows
        if self._places:
            changed[self._places] = rows
        if (rotary := kwargs.get("position_embeddings")) is None:
            return changed
        if len(rotary[0]) == self._patches:
            rows = rows[:, self._special :] - self._special
        changed["position_embeddings"] = tuple(
            part[rows.to(part.device)][:, None] for part in rotary
        )
        return changed
