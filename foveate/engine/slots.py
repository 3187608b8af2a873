"""Which token each slot of a cache layer holds. Shapes as in `layout`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.engine.layout import Layout, compact

T = TypeVar("T")


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
        tail: trailing slots that are known to be whole logical positions in every row; `whole`
            looks whether there are more.
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

    @functools.cached_property
    def whole(self) -> int:
        """Trailing logical positions that have a slot in every row, so that cropping them is exact.
        The host waits for it.
        """
        return self.tail + _tail(self.head, self.length - self.tail)

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
                tail = _tail(new, total) if layout.tail is None else layout.tail
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
        """Forget the last `count` logical positions; the caller has checked `count <= whole`."""
        beyond = max(count - self.tail, 0)
        return self._derive(
            ("crop", count),
            lambda: Slots(
                self.head[:, : self.head.shape[1] - beyond],
                self.length - count,
                self.ragged,
                self.renumbered,
                max(self.tail - count, 0),
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
