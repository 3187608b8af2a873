"""Index maps between the logical and the physical sequence: pure functions on tensors.

Logical: the sequence as everything outside the text model sees it, at full length. Physical: the
columns that exist inside the text model after a reduction. -1 marks a padding column.

Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `S` physical cache
slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """The physical columns of one forward.

    Args:
        index: (B, P) logical position within this forward of each column; -1 is padding. Real
            columns ascend and padding comes first.
        ragged: whether any column is padding.
        tail: columns at the end that are known to hold the last logical positions, without a gap,
            in every row; `None` where the host must look.
    """

    index: Tensor
    ragged: bool
    tail: int | None = None

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Layout:
        """The layout before any reduction: every logical position has its column."""
        return cls(torch.arange(length, device=device).expand(batch, length), ragged=False)


def compact(
    layout: Layout, kept: Tensor, counts: Sequence[int], tail: int | None = None
) -> tuple[Layout, Tensor]:
    """Keep some columns.

    Args:
        layout: (B, P) columns now.
        kept: (B, P) bool, columns to keep.
        counts: number of kept columns of each row, known on the host.
        tail: as in `Layout`, of the new one.

    Returns:
        The new layout, and the (B, P') column of the old layout that each new column comes from
        (an arbitrary one for padding).
    """
    width = max(*counts, 1)
    ragged = min(counts) < width
    # Stable: dropped columns first, kept ones last and in order; so the last `width` columns are
    # left-padded.
    source = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
    index = layout.index.gather(1, source)
    if ragged:
        index = index.masked_fill(~kept.gather(1, source), -1)
    return Layout(index, ragged, tail), source


def take(x: Tensor, source: Tensor) -> Tensor:
    """Pick columns: (B or 1, P, ...) and (B, P') give (B, P', ...)."""
    if source.device != x.device:
        source = source.to(x.device)
    if x.shape[0] == 1 and source.shape[0] == 1:
        return x.index_select(1, source[0])
    rows = torch.arange(source.shape[0], device=x.device)[:, None] if x.shape[0] > 1 else 0
    return x[rows, source]


def each_part(rotary: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rotary embeddings, each part of which is changed: (cos, sin), or one complex tensor."""
    return change(rotary) if isinstance(rotary, Tensor) else tuple(map(change, rotary))


def tokens_second(states: Tensor, axis: int) -> Tensor:
    """(B, P, ...) a view of states whose tokens lie on another axis, with the batch before them."""
    return states if axis == 1 else states.movedim((axis - 1, axis), (0, 1))


def tokens_on(states: Tensor, axis: int) -> Tensor:
    """The way back: a view of (B, P, ...) with tokens on an axis, and the batch before them."""
    return states if axis == 1 else states.movedim((0, 1), (axis - 1, axis))


def take_positions(positions: Tensor, source: Tensor) -> Tensor:
    """Columns of (B, T) positions, or of (axes, B, T) where layers are handed every axis."""
    if positions.dim() == 2:
        return take(positions, source)
    return torch.stack([take(axis, source) for axis in positions])


def expansion(layout: Layout, length: int) -> Tensor:
    """The column that answers for each logical position: the nearest kept one at or before it.

    Args:
        layout: (B, P) columns.
        length: T, logical positions.

    Returns:
        (B, T) columns. Positions before the first kept one get the first real column.
    """
    logical = torch.arange(length, device=layout.index.device).expand(layout.index.shape[0], length)
    column = torch.searchsorted(layout.index.contiguous(), logical.contiguous(), right=True) - 1
    first = (layout.index < 0).sum(1, keepdim=True)
    return torch.maximum(column, first).clamp(max=layout.index.shape[1] - 1)
