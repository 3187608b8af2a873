"""Patch layout: where the tokens of a pass lie among the rows of the encoder, at any point of it.

Images are rows of a batch, with special rows before the patches, and after them too; all of these
come first once tokens have been removed. Or images lie in one sequence, whose order stays (windows
are runs of it); or they are rows of a batch with padding, keep their order as well, and go
on as rows that are as long as the longest. Shapes: `G` images of a group, `V` tokens of each, `K`
of them surviving, `R` rows of a token, `D` width, `B` images of a batch, `S` special rows, `N` rows
of an image of a batch or of all the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from foveate.core import Reduction
from foveate.core.transfer import upload
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.families import Encoder


@dataclass(frozen=True, eq=False)
class Point:
    """What survives at some point of a pass.

    Args:
        layouts: of each group, from all tokens to those that survive.
        order: which of all rows each row is, without padding; `None` while all are there.
        unsort: for a sequence or padded images, which row of all groups, one after the other, each
            row is.
        slots: for padded images, the place of each row among those of the batch.
        length: for padded images, rows of each.
    """

    layouts: tuple[Reduction | None, ...]
    order: Tensor | None = None
    unsort: Tensor | None = None
    slots: Tensor | None = None
    length: int = 0


class PatchLayout:
    """Tokens and rows of one pass.

    Args:
        groups: the images; one group where they are rows of a batch.
        shape: (B, N), or (N) or (1, N) of a sequence: that of the states, less their width.
        encoder: how its rows are laid out.
    """

    def __init__(
        self, groups: Sequence[EncoderGroup], shape: Sequence[int], encoder: Encoder
    ) -> None:
        self.groups = groups
        self.shape = tuple(shape)
        self.encoder = encoder
        self.special = encoder.special
        self.packed = encoder.packed is not None
        self.padded = encoder.padded
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
        if not self.packed and (point.order is not None or cell == 1):
            if point.order is None:
                states = self.encoder.specials_first(states)
            return states[:, self.special :].unflatten(1, (-1, cell)).flatten(2)
        rows = of.rows_at(layout)
        if point.order is not None:
            rows = torch.searchsorted(point.order, rows)
        if point.slots is not None:
            rows = point.slots[rows]
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
            order, unsort = torch.cat([row.flatten() for row in rows]).sort()
            self.now = Point(layouts, order, unsort, *self._slots(order))
        else:
            if self.now.order is None:
                states = self.encoder.specials_first(states)
            start = torch.arange(self.shape[0], device=states.device)[:, None] * self.shape[1]
            every = torch.arange(self.shape[1], device=states.device)[None, :, None]
            specials = start + self.encoder.specials_first(every)[0, : self.special, 0]
            self.now = Point(layouts, torch.cat((specials, rows[0]), 1).flatten())
        self._points.append((first, self.now))
        return self.lay(states, values)

    def _slots(self, order: Tensor) -> tuple[Tensor | None, int]:
        """The place of each row of an order in a batch of padded images, and rows of each image."""
        if not self.padded:
            return None, 0
        counts = [0] * self.shape[0]
        for of in self.groups:
            for number in of.images.numbers:
                counts[number] = of.rows_at(of.layout)[0].numel()
        start = upload([0, *accumulate(counts[:-1])], order.device)
        image, length = order // self.shape[1], max(counts)
        place = torch.arange(len(order), device=order.device) - start[image]
        return image * length + place, length

    def lay(self, states: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Rows of all tokens in the encoder's order, after the special rows of some states; zeros
        for padding.
        """
        width, unsort = states.shape[-1], self.now.unsort
        if unsort is None:
            tokens = values[0].unflatten(2, (-1, width)).flatten(1, 2)
            return torch.cat((states[:, : self.special], tokens), 1)
        flat = torch.cat([value.reshape(-1, width) for value in values]).index_select(0, unsort)
        if self.now.slots is not None:
            rows = flat.new_zeros(self.shape[0] * self.now.length, width)
            flat = rows.index_copy(0, self.now.slots, flat)
        return flat.view(*states.shape[:-2], -1, width)

    @property
    def sequence(self) -> bool:
        """Whether all images lie in one sequence."""
        return self.packed and not self.padded

    @property
    def padding(self) -> bool:
        """Whether rows of now are padding."""
        slots = self.now.slots
        return slots is not None and len(slots) < self.shape[0] * self.now.length

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
        if point.unsort is not None:
            survives = torch.cat([part.flatten() for part in valid])[point.unsort]
            if point.slots is None:
                return point.order.masked_fill(~survives, -1)[None]
            rows = point.order.new_full((self.shape[0] * point.length,), -1)
            rows[point.slots] = (point.order % self.shape[1]).masked_fill(~survives, -1)
            return rows.view(self.shape[0], -1)
        survives = torch.nn.functional.pad(valid[0].flatten(1), (self.special, 0), value=True)
        rows = point.order.view(self.shape[0], -1) % self.shape[1]
        return rows.masked_fill(~survives, -1)

    def full_length(self, states: Tensor, point: Point, missing: float | None = None) -> Tensor:
        """States of some point at full length; see `EncoderGroup.recover` for dropped tokens."""
        parts = [
            of.recover(self.take(states, number, point), point.layouts[number], missing)
            for number, of in enumerate(self.groups)
        ]
        return self.place(states, parts)

    def place(self, states: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all tokens, each at its place, after the special rows of some states.

        Args:
            states: (B, N', D) or (N', D).
            parts: (G, V, R D) of each group.
        """
        width = states.shape[-1]
        specials = states[:, : self.special]
        if not self.packed and parts[0].shape[-1] == width:
            return self.encoder.specials_apart(torch.cat((specials, parts[0]), 1))
        rows = torch.cat([of.rows.flatten() for of in self.groups])
        full = states.new_zeros(torch.Size(self.shape).numel(), width)
        full = full.index_copy(0, rows, torch.cat([part.reshape(-1, width) for part in parts]))
        full = full.view(*self.shape, width)
        if self.special:
            patches = self.encoder.specials_first(full)[:, self.special :]
            full = self.encoder.specials_apart(torch.cat((specials, patches), 1))
        return full
