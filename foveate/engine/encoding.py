"""Encoding: the state of one pass through a vision encoder; gone when it ends.

Pictures of a pass are the rows of a batch, and then all have the same number of tokens and lose
the same number of them; or they lie behind one another in one sequence, and each kind of them has
counts of its own. Shapes: `G` pictures of a stack, `S` special rows before the patches, `V` visual
tokens of a picture, `K` of them alive, `R` rows of a token, `D` hidden, `H` heads; `N` rows of one
picture of a batch, or of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from foveate.engine.plan import PlannedStep
from foveate.engine.sequence import Sequence
from foveate.engine.stack import Stack, stack
from foveate.models import Encoder, Family
from foveate.models.rows import Picture, raster_rows, token_grid
from foveate.reduction import Reduction
from foveate.signals.cls_attention import class_row
from foveate.tokens import VisualTokens

Layouts: TypeAlias = "tuple[Reduction | None, ...]"


class Encoding:
    """One pass: what is alive at each layer, and how to get back to full length.

    Args:
        family: for the grid of an image.
        encoder: the encoder.
        arguments: what its tower was called with.
        side: side of a visual token in patches.
    """

    def __init__(
        self, family: Family, encoder: Encoder, arguments: Mapping[str, Any], side: int
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.arguments = arguments
        self.side = side
        self.stacks: list[Stack] = []
        self.rows: list[tuple[int, int]] = []  # (N of the attention, N of the MLP) of each layer
        self.taps: dict[str, Tensor] | None = None  # projections of the layer that is running
        self.bias: Tensor | None = None  # (B, 1, 1, N) or (N) what keys' scores get
        self._full = torch.Size()  # shape of the states, less their width
        self._order: Tensor | None = None  # (rows) which of all rows each row of now is
        self._sorted = torch.empty(0)
        self._proportional = False
        self._history: list[tuple[int, Layouts, Tensor | None]] = []

    # -- what there is

    def see(self, states: Tensor, mask: Tensor | None = None) -> None:
        """Learn the pictures from (B, S + V R, D) or (N, D) states at full length.

        Args:
            states: the states.
            mask: what hides padding from the encoder's attention.
        """
        if self.stacks:
            return
        self._full = states.shape[:-1]
        if self.encoder.packed is not None:
            self.stacks = stack(self.encoder.packed(self.arguments, self.side), states.device)
            return
        special, (images, length) = self.encoder.special, states.shape[:2]
        grid = self._patches(length - special)
        rows = special + raster_rows(*grid, self.side)
        tokens = token_grid(*grid, self.side)
        pictures = [Picture(tokens, rows + n * length) for n in range(images)]
        self.stacks = stack(pictures, states.device)
        if mask is not None and (hidden := _hidden(mask)) is not None:
            visible = (~hidden).expand(images, -1).flatten().float()
            self.stacks[0].visible = visible[self.stacks[0].rows]

    def _patches(self, count: int) -> tuple[int, int]:
        """(height, width) of a picture's patches."""
        patch, pixels = getattr(self.encoder.tower.config, "patch_size", None), self.pixels
        if pixels is not None and pixels.dim() == 4:
            sides = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))
            height, width = (n // side for n, side in zip(pixels.shape[-2:], sides, strict=True))
            if height * width == count:
                return height, width
        return self.family.grid(count)

    @property
    def pixels(self) -> Tensor | None:
        """What the tower is fed."""
        return self.arguments.get("pixel_values")

    @property
    def length(self) -> int:
        """Rows of a picture at full length, special ones included; of all where they are packed."""
        return self._full[-1] if self._full else 0

    @property
    def reduced(self) -> bool:
        """Whether any token has been removed."""
        return self._order is not None

    @property
    def pictures(self) -> list[tuple[Stack, int]]:
        """For each picture of the pass, its stack and its place there."""
        members = {n: (of, i) for of in self.stacks for i, n in enumerate(of.pictures)}
        return [members[n] for n in sorted(members)]

    def kept(self, number: int) -> dict[str, Tensor]:
        """Place -> (K) raster positions of a picture alive behind it, ascending."""
        of, i = self.pictures[number]
        return {place: index[i].sort().values for place, index in of.kept.items()}

    # -- steps

    def removes(self, steps: list[PlannedStep]) -> bool:
        """Whether any of some steps removes anything; if none does, they are noted as done."""
        if any(self._count(p, of) < of.alive for p in steps for of in self.stacks):
            return True
        for planned in steps:
            self._note(planned)
        return False

    def _count(self, planned: PlannedStep, of: Stack) -> int:
        """How many tokens of each picture of a stack survive a step."""
        total = of.begin.get(planned.method_number, of.alive)
        return planned.method.count(of.alive, total, planned.step, planned.number)

    def reduce(
        self,
        steps: list[PlannedStep],
        hidden: Tensor,
        signals: Callable[[str, Stack], Tensor],
    ) -> Tensor:
        """Run steps at one place.

        Args:
            steps: the steps.
            hidden: states there.
            signals: a signal of a stack by name.
        """
        for planned in steps:
            for of in self.stacks:
                of.begin.setdefault(planned.method_number, of.alive)
            if any(self._count(planned, of) < of.alive for of in self.stacks):
                hidden = self._step(planned, hidden, signals)
            self._note(planned)
        return hidden

    def _step(
        self, planned: PlannedStep, hidden: Tensor, signals: Callable[[str, Stack], Tensor]
    ) -> Tensor:
        step, values = planned.step, []
        layouts, order = self._layouts, self._order
        for of, layout in zip(self.stacks, layouts, strict=True):
            x, count = self._take(hidden, of, layout, order), self._count(planned, of)
            if count < of.alive:
                tokens = VisualTokens(
                    features=lambda x=x, of=of: _mean(x, of),  # type: ignore[misc]
                    index=of.index,
                    grid=of.grid,
                    rows=of.pictures,
                    signals={need.name: signals(need.name, of) for need in step.needs},
                    merged=of.merged,
                    special=self.encoder.special,
                    place=step.place,
                    frames=of.frames,
                )
                reduction = planned.method.reduce(tokens, count)
                of.reduce(reduction)
                x = reduction.apply(x)
            values.append(x)
        hidden = self._put(hidden, values)
        self._proportional |= step.proportional
        self._weigh(hidden)
        # The first hidden state is captured behind the steps before layer 0.
        first = 0 if step.layer == 0 and not step.inside else step.layer + 1
        self._history.append((first, self._layouts, self._order))
        return hidden

    def _note(self, planned: PlannedStep) -> None:
        for of in self.stacks:
            of.begin.setdefault(planned.method_number, of.alive)
            of.kept[planned.step.place] = of.index

    @property
    def _layouts(self) -> Layouts:
        return tuple(of.layout for of in self.stacks)

    # -- rows and tokens

    def _take(
        self, states: Tensor, of: Stack, layout: Reduction | None, order: Tensor | None
    ) -> Tensor:
        """(G, K, R D) values of a stack's tokens, from states of the rows of some point."""
        special, cell = self.encoder.special, of.rows.shape[2]
        if self.encoder.packed is None and (order is not None or cell == 1):
            return states[:, special:].unflatten(1, (-1, cell)).flatten(2)
        rows = of.rows_at(layout)
        if order is not None:
            rows = torch.searchsorted(order, rows)
        taken = states.reshape(-1, states.shape[-1]).index_select(0, rows.flatten())
        return taken.view(*rows.shape[:2], -1)

    def _put(self, hidden: Tensor, values: list[Tensor]) -> Tensor:
        """States of the tokens alive, in the encoder's order, which is remembered."""
        rows = [of.rows_at(of.layout).flatten(1) for of in self.stacks]
        if self.encoder.packed is None:
            images, length = self._full
            start = torch.arange(images, device=hidden.device)[:, None] * length
            first = start + torch.arange(self.encoder.special, device=hidden.device)
            self._order = torch.cat((first, rows[0]), 1).flatten()
        else:
            self._order, self._sorted = torch.cat([row.flatten() for row in rows]).sort()
        return self._lay(hidden, values)

    def _lay(self, states: Tensor, values: list[Tensor]) -> Tensor:
        """Rows of all stacks' tokens (G, K, R D) in the encoder's order, behind special rows."""
        width = states.shape[-1]
        if self.encoder.packed is None:
            tokens = values[0].unflatten(2, (-1, width)).flatten(1, 2)
            return torch.cat((states[:, : self.encoder.special], tokens), 1)
        flat = torch.cat([value.reshape(-1, width) for value in values])
        return flat.index_select(0, self._sorted).view(*states.shape[:-2], -1, width)

    def _weigh(self, hidden: Tensor) -> None:
        """Find out what the scores of each key get, and forget what layers were told."""
        counts = self.counts(hidden, merged=self._proportional)
        self.bias = None
        if counts is not None:
            bias = counts.log().to(hidden.dtype).clamp(min=torch.finfo(hidden.dtype).min)
            self.bias = bias[:, None, None] if self.encoder.packed is None else bias.flatten()
        if self.encoder.packed is not None:
            assert self._order is not None
            self._sequence = Sequence(self._order, self.bias)

    def counts(self, hidden: Tensor, *, merged: bool) -> Tensor | None:
        """(B, N) or (N) how many rows that others attend to each row stands for; `None` if all 1.

        Args:
            hidden: states of now.
            merged: whether merged tokens count as often as they have sources, or once.
        """
        parts = [of.counts(of.layout, merged=merged) for of in self.stacks]
        if all(part is None for part in parts):
            return None
        ones = hidden.new_ones(*hidden.shape[:-1], 1, dtype=torch.float32)
        values = [
            torch.ones(of.rows_at(of.layout).shape, device=hidden.device) if part is None else part
            for part, of in zip(parts, self.stacks, strict=True)
        ]
        return self._lay(ones, values)[..., 0]

    # -- signals

    def tapped(self, name: str, of: Stack) -> Tensor:
        """A signal of the layer that is running, from its own projections; a token's keys are the
        mean of its rows'.
        """
        assert self.taps is not None  # only asked for between the halves of a layer
        names = self.encoder.projections
        if name == "encoder_keys":
            key = self.taps[names[-1]].detach()
            key = key if len(names) > 1 else key.chunk(3, -1)[1]
            key = _mean(self._take(key, of, of.layout, self._order), of)
            return key.unflatten(-1, (self.encoder.heads, -1)).transpose(1, 2)[:, None]
        query, key = (self.taps[part].detach() for part in names)
        return self._of_class(query, key, of)

    @torch.no_grad()
    def ahead(self, layer: Any, hidden: Tensor, of: Stack) -> Tensor:
        """(B, 1, H, K) class-token attention of a layer that is about to run."""
        block, attention = self.encoder.block, self.encoder.attention(layer)
        assert block is not None  # checked in the plan
        normed = getattr(layer, block.norm1)(hidden)
        query, key = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
        if self.encoder.projections != ("q_proj", "k_proj"):  # norms behind them
            query, key = (
                getattr(attention, name)(part)
                for name, part in zip(self.encoder.projections, (query, key), strict=True)
            )
        return self._of_class(query, key, of)

    def _of_class(self, query: Tensor, key: Tensor, of: Stack) -> Tensor:
        """(B, 1, H, K) attention of the class token to tokens: to all their rows."""
        special = self.encoder.special
        row = class_row(query, key, self.encoder.heads, special, self.bias).transpose(1, 2)
        row = torch.nn.functional.pad(row, (0, 0, special, 0))
        tokens = self._take(row, of, of.layout, self._order)
        return tokens.unflatten(2, (-1, row.shape[2])).sum(2).transpose(1, 2)[:, None]

    def widen(self, row: Tensor) -> Tensor:
        """(B, H, V R) of a signal (B, H, K R) of the rows alive: each row has that of the survivor
        that its token went into.
        """
        if not self.reduced:
            return row
        special = self.encoder.special
        states = torch.nn.functional.pad(row.transpose(1, 2), (0, 0, special, 0))
        whole = self._whole(states, self._layouts, self._order, 0.0)
        return whole[:, special:].transpose(1, 2)

    # -- the way out

    def told(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer must be told, once tokens have been removed."""
        if self.encoder.packed is not None:
            return self._sequence.translate(kwargs)
        given = kwargs.get("attention_mask")
        if not self.encoder.masks_layers:
            return dict(kwargs)
        mask = self.bias
        if mask is not None and given is not None and given.dim() == 2:  # as flash kernels take it
            mask = mask[:, 0, 0] > -1
        return {**kwargs, "attention_mask": mask}

    def whole(self, states: Tensor) -> Tensor:
        """States of now at full length."""
        return self._whole(states, self._layouts, self._order) if self.reduced else states

    def leave(self, output: Any) -> Any:
        """Bring what the encoder returns back to full length, in place."""
        if not self.reduced:
            return output
        if self.encoder.returns_rows:
            output.last_hidden_state = self.whole(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(
                self._at(number, states) for number, states in enumerate(output.hidden_states)
            )
        return output

    def _at(self, number: int, states: Tensor | None) -> Tensor | None:
        """A hidden state at full length."""
        points = [point[1:] for point in self._history if point[0] <= number]
        return states if states is None or not points else self._whole(states, *points[-1])

    def _whole(
        self, states: Tensor, layouts: Layouts, order: Tensor | None, missing: float | None = None
    ) -> Tensor:
        """States of some point at full length; see `Stack.recover` for dropped tokens."""
        pairs = list(zip(self.stacks, layouts, strict=True))
        parts = [of.recover(self._take(states, of, la, order), la, missing) for of, la in pairs]
        special, width = self.encoder.special, states.shape[-1]
        if self.encoder.packed is None and self.side == 1:
            return torch.cat((states[:, :special], parts[0]), 1)
        rows = torch.cat([of.rows.flatten() for of in self.stacks])
        whole = states.new_zeros(self._full.numel(), width)
        whole = whole.index_copy(0, rows, torch.cat([part.view(-1, width) for part in parts]))
        whole = whole.view(*self._full, width)
        if special:
            whole = torch.cat((states[:, :special], whole[:, special:]), 1)
        return whole


def _mean(x: Tensor, of: Stack) -> Tensor:
    """(G, K, D) mean of each token's rows, from (G, K, R D)."""
    cell = of.rows.shape[2]
    return x if cell == 1 else x.unflatten(2, (cell, -1)).mean(2)


def _hidden(mask: Tensor) -> Tensor | None:
    """(B or 1, N) rows that a mask hides from all others; `None` if it hides none."""
    keys = mask if mask.dim() == 2 else mask[:, 0, 0]
    hidden = keys < 0 if keys.is_floating_point() else keys == 0
    return hidden if bool(hidden.any()) else None
