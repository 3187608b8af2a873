"""Patch layout: where the tokens of a pass lie among the rows of the encoder, at any point of it.

Images are rows of a batch, after special rows, and padded where they differ in size; or they lie in
one sequence, whose order stays (windows are runs of it). Shapes: `G` images of a group, `V` tokens
of each, `K` of them surviving, `R` rows of a token, `D` width, `B` images of a batch, `S` special
rows, `N` rows of an image of a batch or of all the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Reduction
from foveate.engine.vision.encoder_group import EncoderGroup


@dataclass(frozen=True, eq=False)
class Point:
    """What survives at some point of a pass.

    Args:
        layouts: of each group, from all tokens to those that survive.
        order: which of all rows each row is, -1 for padding; `None` while all are there.
        unsort: for a sequence, and for images that differ in size, which row of all groups, one
            after the other, each row is but for special ones; for padding, any.
    """

    layouts: tuple[Reduction | None, ...]
    order: Tensor | None = None
    unsort: Tensor | None = None


class PatchLayout:
    """Tokens and rows of one pass.

    Args:
        groups: the images.
        shape: (B, N), or (N) or (1, N) of a sequence: that of the states, less their width.
        special: rows before the tokens of each image.
        packed: whether the images lie in one sequence.
    """

    def __init__(
        self, groups: Sequence[EncoderGroup], shape: Sequence[int], special: int, packed: bool
    ) -> None:
        self.groups = groups
        self.shape = tuple(shape)
        self.special = special
        self.packed = packed
        rows = sum(of.rows.numel() for of in groups)
        self.padded = not packed and rows < sum(self.shape[:1]) * (sum(self.shape[1:]) - special)
        self.now = Point(tuple(None for _ in groups))
        self._points: list[tuple[int, Point]] = []

    def take(self, states: Tensor, number: int, point: Point | None = None) -> Tensor:
        """(G, K, R D) values of a group's tokens.

        Args:
            states: (B, N, D) or (N, D) rows of some point.
            number: the group.
            point: the point; now by default.
        """
        point = self.now if point is None else point
        of, layout = self.groups[number], point.layouts[number]
        cell = of.rows.shape[2]
        if self.padded and point.order is not None:
            count = of.total if layout is None else layout.index.shape[1]
            stop = self.special + count * cell
            return states[self._images(of), self.special : stop].unflatten(1, (-1, cell)).flatten(2)
        if not self.packed and not self.padded and (point.order is not None or cell == 1):
            return states[:, self.special :].unflatten(1, (-1, cell)).flatten(2)
        rows = of.rows_at(layout)
        if point.order is not None:
            rows = torch.searchsorted(point.order, rows)
        taken = states.reshape(-1, states.shape[-1]).index_select(0, rows.flatten())
        return taken.view(*rows.shape[:2], -1)

    def put(self, states: Tensor, values: Sequence[Tensor], first: int) -> Tensor:
        """Rows of the tokens that survive now, which becomes a point of the pass.

        Args:
            states: the states of before, for special rows.
            values: (G, K, R D) of each group.
            first: first hidden state of the encoder's output that has these rows.
        """
        layouts = tuple(of.layout for of in self.groups)
        rows = [of.rows_at(of.layout).flatten(1) for of in self.groups]
        if self.packed:
            self.now = Point(layouts, *torch.cat([row.flatten() for row in rows]).sort())
        else:
            self.now = Point(layouts, *self._in_batch(rows))
        self._points.append((first, self.now))
        return self.lay(states, values)

    def _in_batch(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(B N) which of all rows each row of a batch is, -1 for padding; and, where images differ
        in size, (B, N) which row of all groups it is, special ones aside.

        Args:
            rows: (G, K R) rows of each group.
        """
        tokens, unsort = rows[0], None
        if self.padded:
            filled = self._filled(rows)
            unsort = filled.clamp(min=0)
            tokens = torch.cat([row.flatten() for row in rows])[unsort].masked_fill(filled < 0, -1)
        start = torch.arange(self.shape[0], device=tokens.device)[:, None] * self.shape[1]
        specials = start + torch.arange(self.special, device=tokens.device)
        return torch.cat((specials, tokens), 1).flatten(), unsort

    def _images(self, of: EncoderGroup) -> Tensor:
        """(G) which of the batch the images of a group are."""
        return of.rows[:, 0, 0] // self.shape[1]

    def _filled(self, rows: Sequence[Tensor]) -> Tensor:
        """(B, N) which row of all groups, one after the other, the rows of each image are, special
        ones aside; -1 for padding.

        Args:
            rows: (G, K R) rows of each group.
        """
        longest = max(row.shape[1] for row in rows)
        found = torch.full((self.shape[0], longest), -1, device=rows[0].device)
        start = 0
        for of, row in zip(self.groups, rows, strict=True):
            numbers = torch.arange(row.numel(), device=row.device).view_as(row)
            found[self._images(of), : row.shape[1]] = start + numbers
            start += row.numel()
        return found

    def lay(self, states: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Rows of all tokens in the encoder's order, after the special rows of some states."""
        width, unsort = states.shape[-1], self.now.unsort
        if unsort is None:
            tokens = values[0].unflatten(2, (-1, width)).flatten(1, 2)
            return torch.cat((states[:, : self.special], tokens), 1)
        flat = torch.cat([value.reshape(-1, width) for value in values])
        rows = flat.index_select(0, unsort.flatten()).view(*states.shape[:-2], -1, width)
        return torch.cat((states[:, : self.special], rows), 1) if self.special else rows

    @property
    def padding(self) -> Tensor | None:
        """(B, N) which rows of now are padding; `None` if none is."""
        if not self.padded or self.now.order is None:
            return None
        padding = self.now.order.view(self.shape[0], -1) < 0
        return padding if bool(padding.any()) else None

    def at(self, number: int) -> Point | None:
        """The point that a hidden state of the encoder's output is from; `None` for full length."""
        points = [point for first, point in self._points if first <= number]
        return points[-1] if points else None

    def rows_of(self, point: Point) -> Tensor:
        """(B, N') the row that each row of a point is of its image, or (1, N') of the sequence;
        -1 for padding.
        """
        assert point.order is not None  # something has been removed
        valid = [
            torch.ones_like(of.rows_at(layout), dtype=torch.bool)
            if layout is None or layout.valid is None
            else layout.valid[..., None].expand(-1, -1, of.rows.shape[2])
            for of, layout in zip(self.groups, point.layouts, strict=True)
        ]
        survives = valid[0].flatten(1)
        if point.unsort is not None:
            survives = torch.cat([part.flatten() for part in valid])[point.unsort]
        if self.packed:
            return point.order.masked_fill(~survives, -1)[None]
        survives = torch.nn.functional.pad(survives, (self.special, 0), value=True)
        order = point.order.view(self.shape[0], -1)
        return (order % self.shape[1]).masked_fill(~survives | (order < 0), -1)

    def full_length(self, states: Tensor, point: Point, missing: float | None = None) -> Tensor:
        """States of some point at full length; see `EncoderGroup.recover` for dropped tokens."""
        parts = [
            of.recover(self.take(states, number, point), point.layouts[number], missing)
            for number, of in enumerate(self.groups)
        ]
        width = states.shape[-1]
        if not self.packed and not self.padded and parts[0].shape[-1] == width:
            return torch.cat((states[:, : self.special], parts[0]), 1)
        rows = torch.cat([of.rows.flatten() for of in self.groups])
        full = states.new_zeros(torch.Size(self.shape).numel(), width)
        full = full.index_copy(0, rows, torch.cat([part.view(-1, width) for part in parts]))
        full = full.view(*self.shape, width)
        if self.special:
            full = torch.cat((states[:, : self.special], full[:, self.special :]), 1)
        return full
