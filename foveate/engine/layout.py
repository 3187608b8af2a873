"""Index maps between the logical and the physical sequence: pure functions on tensors.

Logical: the sequence as everything outside the text model sees it, at full length. Physical: the
columns that exist inside the text model after a reduction. -1 marks a padding column.

Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `S` physical cache
slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Layout:
    """The physical columns of one forward.

    Args:
        index: (B, P) logical position within this forward of each column; -1 is padding. Real
            columns ascend and padding comes first.
        ragged: whether any column is padding.
    """

    index: Tensor
    ragged: bool

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Layout:
        """The layout before any reduction: every logical position has its column."""
        return cls(torch.arange(length, device=device).expand(batch, length), ragged=False)


def compact(layout: Layout, kept: Tensor, counts: Sequence[int]) -> tuple[Layout, Tensor]:
    """Keep some columns.

    Args:
        layout: (B, P) columns now.
        kept: (B, P) bool, columns to keep.
        counts: number of kept columns of each row, known on the host.

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
    return Layout(index, ragged), source


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


@dataclass(frozen=True, eq=False)
class Slots:
    """Which logical position each cache slot holds. Layers that were cut alike share one `Slots`.

    The last slots hold the last logical positions, which need no table: so a new token changes two
    numbers. Every change gives a new value; the last one is remembered, so that layers which share
    a value and change alike (a beam reorder, a new token) go on sharing.

    Args:
        head: (B, S - tail) logical position in the whole sequence of each slot before the tail; -1
            is padding.
        length: logical length of the sequence.
        ragged: whether any slot is padding.
        renumbered: (B, 1) positions that renumbering has taken off each row so far; `None` if it
            never did.
        tail: trailing slots that are whole logical positions in every row, so that cropping them
            is exact.
        visual: (B, at most S) which slots hold visual tokens, those after it hold none; `None`
            where nobody asks. The same tensor as long as text alone is appended.
    """

    head: Tensor
    length: int
    ragged: bool
    renumbered: Tensor | None
    tail: int
    visual: Tensor | None = None
    _last: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Slots:
        """The slots of a cache layer from which nothing was removed."""
        head = torch.empty(batch, 0, dtype=torch.long, device=device)
        return cls(head, length, False, None, length)

    @functools.cached_property
    def count(self) -> int:
        """Slots of a row, S."""
        return self.head.shape[1] + self.tail

    @functools.cached_property
    def index(self) -> Tensor:
        """(B, S) logical position of each slot; -1 is padding."""
        tail = torch.arange(self.length - self.tail, self.length, device=self.head.device)
        return torch.cat((self.head, tail.expand(self.head.shape[0], -1)), dim=1)

    @property
    def all_visual(self) -> Tensor | None:
        """(B, S) `visual`, for all slots."""
        if self.visual is None:
            return None
        return F.pad(self.visual, (0, self.count - self.visual.shape[1]))

    def extend(
        self,
        layout: Layout,
        length: int,
        renumbered: Tensor | None,
        visual: Tensor | None = None,
    ) -> Slots:
        """Append the columns of a forward.

        Args:
            layout: the columns.
            length: logical positions of the forward, T.
            renumbered: (B, 1) positions that renumbering takes off each row there.
            visual: (B, T) which positions are visual, where somebody asks.
        """

        def make() -> Slots:
            total = self.length + length
            head, tail = self.head, self.tail + length
            if layout.ragged or layout.index.shape[1] < length:
                new = layout.index + self.length
                if layout.ragged:
                    new = new.masked_fill(layout.index < 0, -1)
                tail = _tail(new, total)
                head = torch.cat((self.index, new[:, : new.shape[1] - tail]), dim=1)
            ragged = self.ragged or layout.ragged
            shift = _sum(self.renumbered, renumbered)
            return Slots(head, total, ragged, shift, tail, self._marks(layout, visual))

        return self._derive(layout, make)

    def grow(self, key: object, length: int) -> Slots:
        """Append logical positions without visual tokens, all of which have columns; `key` names
        the forward for layers that share slots.
        """
        return self._derive(
            key,
            lambda: Slots(
                self.head,
                self.length + length,
                self.ragged,
                self.renumbered,
                self.tail + length,
                self.visual,
            ),
        )

    def rows(self, key: object, pick: Callable[[Tensor], Tensor]) -> Slots:
        """Reorder, repeat or select rows; `key` names the operation for layers that share slots."""
        return self._derive(
            key,
            lambda: Slots(
                pick(self.head),
                self.length,
                self.ragged,
                None if self.renumbered is None else pick(self.renumbered),
                self.tail,
                None if self.visual is None else pick(self.visual),
            ),
        )

    def last(self, count: int) -> Slots:
        """Keep the last `count` slots, as sliding-window layers do."""
        gone = self.count - count
        if gone <= 0:
            return self
        return self._derive(
            ("last", count),
            lambda: Slots(
                self.head[:, gone:],
                self.length,
                self.ragged,
                self.renumbered,
                min(self.tail, count),
                None if self.visual is None else self.visual[:, gone:],
            ),
        )

    def skip(self, first: int, count: int) -> Slots:
        """Forget `count` slots after the `first`."""

        def make() -> Slots:
            def left(x: Tensor) -> Tensor:
                return torch.cat((x[:, :first], x[:, first + count :]), dim=1)

            tail = min(self.tail, self.count - first - count)
            head = left(self.index)[:, : self.count - count - tail]
            marks = self.all_visual
            visual = None if marks is None else left(marks)
            return Slots(head, self.length, self.ragged, self.renumbered, tail, visual)

        return self._derive(("skip", first, count), make)

    def without(self, gone: Tensor) -> tuple[Slots, Tensor]:
        """Forget some logical positions, and all padding.

        Args:
            gone: (B, length) positions to forget.

        Returns:
            What is left, and the (B, S') slot of now that each slot left comes from.
        """
        return self.keep((self.index >= 0) & ~gone.gather(1, self.index.clamp(min=0)))

    def keep(self, kept: Tensor) -> tuple[Slots, Tensor]:
        """Keep (B, S) slots, none of them padding. Returns the same as `without`."""

        def make() -> tuple[Slots, Tensor]:
            left, source = compact(Layout(self.index, self.ragged), kept, kept.sum(1).tolist())
            tail = _tail(left.index, self.length)
            head = left.index[:, : left.index.shape[1] - tail]
            visual = self.all_visual
            if visual is not None:
                visual = visual.gather(1, source) & (left.index >= 0)
            return Slots(head, self.length, left.ragged, self.renumbered, tail, visual), source

        return self._derive(kept, make)

    def crop(self, count: int) -> Slots:
        """Forget the last `count` logical positions; the caller has checked `count <= tail`."""
        return self._derive(
            ("crop", count),
            lambda: Slots(
                self.head,
                self.length - count,
                self.ragged,
                self.renumbered,
                self.tail - count,
                None if self.visual is None else self.visual[:, : self.count - count],
            ),
        )

    def _marks(self, layout: Layout, visual: Tensor | None) -> Tensor | None:
        if visual is None and self.visual is None:
            return None
        before = self.all_visual
        if before is None:
            before = torch.zeros_like(self.index, dtype=torch.bool)
        new = torch.zeros_like(layout.index, dtype=torch.bool)
        if visual is not None:
            new = visual.gather(1, layout.index.clamp(min=0)) & (layout.index >= 0)
        return torch.cat((before, new), dim=1)

    def _derive(self, key: object, make: Callable[[], T]) -> T:
        for last, value in self._last:
            if last is key or (isinstance(key, tuple) and isinstance(last, tuple) and last == key):
                return value
        value = make()
        self._last[:] = [(key, value)]
        return value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _tail(index: Tensor, end: int) -> int:
    """Trailing columns that hold the last logical positions, without a gap, in every row."""
    width = index.shape[1]
    wanted = torch.arange(end - width, end, device=index.device)
    whole = (index == wanted).all(0).flip(0)
    return int(whole.long().cumprod(0).sum())


def translate_mask(
    mask: Tensor | None,
    layout: Layout,
    slots: Slots,
    length: int,
    *,
    two_d: bool,
    width: int = 0,
    foreign: bool = False,
    causal: bool = True,
) -> Tensor | None:
    """The attention mask of the physical columns.

    Args:
        mask: what the text model built for the logical sequence: `None`, (B, K) for flash kernels,
            or (B or 1, H or 1, T, K), boolean (True attends) or additive.
        layout: (B, P) columns of this forward, the queries.
        slots: (B, S) cache slots after this forward, the keys.
        length: T, logical length of this forward.
        two_d: whether the kernel takes 2-D masks.
        width: columns the keys really have, where a static cache holds more than S.
        foreign: whether an earlier layer made the keys, of other columns than these.
        causal: whether queries see the keys before them alone where there is no mask, or all.

    Returns:
        `None` if the kernel's own rule is right, else (B, S) or (B, H or 1, P, S). Padding
        columns attend everywhere, so that they stay finite; nothing attends to them.
    """
    queries = layout.index.shape[1]
    unfilled = max(width - slots.count, 0)
    ragged = slots.ragged or layout.ragged
    # What queries would see by the kernel's own rule: slots that are not filled, or later keys.
    shown = unfilled and (queries == 1 or not causal)
    later = foreign and causal and queries > 1
    if mask is None and not (ragged or shown or later):
        return None
    keys = F.pad(slots.index, (0, unfilled), value=-1)
    if mask is None and not causal:
        return keys >= 0 if two_d else (keys >= 0)[:, None, None]
    if mask is None:
        return _causal(layout, slots, keys, length, two_d=two_d)
    real = keys >= 0
    # Masks of sliding windows begin later than at position 0.
    offset = max(slots.length - mask.shape[-1], 0)
    real = keys >= offset if offset else real
    column = (keys - offset).clamp(min=0)
    if mask.dim() == 2:
        return mask.gather(1, column) * real.to(mask.dtype)
    physical = _picked(mask, layout.index.clamp(min=0), column)
    refuse = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    physical = physical.masked_fill(~real[:, None, None], refuse)
    if layout.ragged:
        allow = True if mask.dtype == torch.bool else 0.0
        physical = physical.masked_fill((layout.index < 0)[:, None, :, None], allow)
    return physical


def _picked(mask: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(B, H or 1, P, S) of a mask (B or 1, H or 1, T, K) at (B, P) rows and (B, S) columns."""
    batch = len(row)
    if mask.shape[0] == 1 and batch == 1:
        return mask.index_select(2, row[0]).index_select(3, column[0])
    rows = torch.arange(batch, device=mask.device)[:, None, None] if mask.shape[0] > 1 else 0
    return mask.movedim(1, -1)[rows, row[..., None], column[:, None]].movedim(-1, 1)


def translate_padding(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """The padding mask of the physical columns, for layers that mix tokens into a running state.

    Args:
        mask: (B, T) real positions, as the text model made it; `None` for all.
        layout: (B, P) columns of this forward.

    Returns:
        (B, P), or `None` where every column is real.
    """
    if mask is None:
        return layout.index >= 0 if layout.ragged else None
    real = mask.gather(1, layout.index.clamp(min=0).to(mask.device))
    return real * (layout.index >= 0).to(real) if layout.ragged else real


def _causal(layout: Layout, slots: Slots, keys: Tensor, length: int, *, two_d: bool) -> Tensor:
    """The mask of causal attention by logical position, where there was no mask to translate."""
    real = keys >= 0
    if two_d:
        return real
    if layout.index.shape[1] == 1:
        return real[:, None, None]
    asked = layout.index + (slots.length - length)
    allowed = real[:, None] & (keys[:, None] <= asked[..., None])
    return (allowed | (layout.index < 0)[..., None])[:, None]
