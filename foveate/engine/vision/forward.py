"""Encoding: the state of one pass through a vision encoder, which ends with the pass.

The images of a pass may be the rows of a batch. Then all have equally many tokens, and lose equally
many. Or they follow one another in one sequence, or are rows that the encoder pads, and each group
of them has counts of its own. Shapes: `G` images of a group, `S` special rows before the patches,
`V` visual tokens of an image, `K` of them surviving, `R` rows of a token, `D` hidden, `H` heads;
`N` rows of one image of a batch, or of all the sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core import Need, VisualTokens
from foveate.core.reduction import take_rows
from foveate.core.tokens import Shape
from foveate.engine.images import Kept
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.decisions import apart, decided, told
from foveate.engine.vision.encoder_group import (
    EncoderGroup,
    encoder_groups,
    images_of,
    mean_of_rows,
)
from foveate.engine.vision.patch_layout import PatchLayout, Point
from foveate.engine.vision.pixels import pixels_of_rows
from foveate.engine.vision.running_layer import RunningLayer
from foveate.engine.vision.segments import BatchRows, PackedRows, PaddedRows
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Encoder, Family
from foveate.signals.encoder_hooks import hides, signal_of


class Encoding:
    """One pass: what survives at each layer, and how to get back to full length.

    Args:
        family: for the grid of an image.
        encoder: the encoder.
        arguments: what its tower was called with.
        side: side of a visual token in patches.
        readout: numbers, among the tokens of all images, of those that may not be removed.
        steps: all that are planned inside the encoder.
    """

    def __init__(
        self,
        family: Family,
        encoder: Encoder,
        arguments: Mapping[str, Any],
        side: int,
        readout: Tensor | None = None,
        steps: Sequence[PlannedStep] = (),
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.arguments = arguments
        self.side = side
        self.readout = readout
        self.steps = steps
        self.layout = PatchLayout((), (), encoder)
        self.rows: list[tuple[int, int]] = []  # (N of the attention, N of the MLP) of each layer
        self.bounds: list[Tensor | None] = []  # of each layer's segments
        self.points: dict[int, Point] = {}  # what the attention of each layer sees
        self.layer = RunningLayer(family, encoder, self.layout)
        self._memory: dict[tuple[int, int], dict[str, Any]] = {}  # of a method and a group
        self._proportional = False
        self._told: BatchRows | PackedRows | PaddedRows | None = None  # for the rows that remain
        self.between: Tensor | None = None  # states of now, where the model was handed all rows
        self.restored = False

    # -- what there is

    @property
    def layer_rows(self) -> list[tuple[int, int]]:
        """N of the attention and of the MLP of every layer, those before the first step too."""
        length = self.layout.shape[-1] if self.groups else 0
        return [(length, length)] * self._untouched + self.rows

    @property
    def layer_bounds(self) -> list[Tensor | None]:
        """Boundaries of every layer's segments; `None` before the first step."""
        return [None] * self._untouched + self.bounds

    @property
    def _untouched(self) -> int:
        """Layers before the first step."""
        return len(self.encoder.layers) - len(self.rows)

    def see(self, states: Tensor, mask: Tensor | None = None) -> None:
        """Learn the images from (B, S + V R, D) or (N, D) states at full length.

        Args:
            states: the states.
            mask: what hides padding from the encoder's attention.
        """
        if self.groups:
            return
        if self.encoder.masks_kernels or self.encoder.mask != "attention_mask":
            self._check_unmasked()
            mask = None
        encoder_images = images_of(
            self.family, self.encoder, self.arguments, self.side, *states.shape[:2]
        )
        groups = encoder_groups(encoder_images, states.device, self.readout)
        self.layout = self.layer.layout = PatchLayout(groups, states.shape[:-1], self.encoder)
        if mask is None or self.layout.packed:
            return
        hidden = hides(mask)
        for planned in self.steps:
            whole = planned.step.whole or "exit" in planned.step.effects
            if whole and bool(hidden.any()):
                raise UnsupportedModelError(
                    f"{planned.method.slug} does not act on images that the encoder pads; encode "
                    "images of one size together, without padding"
                )
        visible = (~hidden).expand(len(encoder_images), -1).flatten().float()
        groups[0].visible = visible[groups[0].rows]

    def _check_unmasked(self) -> None:
        for name in {self.encoder.mask, "attention_mask", "is_causal"} & set(self.arguments):
            if self.arguments[name] is not None and self.arguments[name] is not False:
                raise InputError(
                    f"{name}, which hides patches from others, is not supported where tokens are "
                    "removed inside this encoder; leave it out, or do without methods"
                )

    @property
    def pixels(self) -> Tensor | None:
        """What the tower is fed."""
        return self.arguments.get("pixel_values")

    @property
    def groups(self) -> Sequence[EncoderGroup]:
        """The images of the pass."""
        return self.layout.groups

    @property
    def reduced(self) -> bool:
        """Whether any token has been removed."""
        return self.layer.reduced

    @property
    def shortened(self) -> bool:
        """Whether states of now lack tokens that have been removed."""
        return self.reduced and not self.restored

    @property
    def order(self) -> Tensor | None:
        """Which of all rows each row of now is, ascending; `None` while all are there."""
        return self.layout.now.order

    def survivors(self) -> list[tuple[Shape, Kept]]:
        """For each image of the pass, its shape, and entry of each step -> (K) raster positions
        that survive it, ascending.
        """
        groups = (of.images for of in self.groups)
        found = {image.number: (of.shape, image.kept) for of in groups for image in of.images}
        return [found[number] for number in sorted(found)]

    @property
    def bias(self) -> Tensor | None:
        """(B, 1, 1, N) or (N) what the scores of each key get."""
        return self.layer.bias

    # -- steps

    def removes(self, steps: list[PlannedStep]) -> bool:
        """Whether any of some steps removes anything; if none does, they are noted as done."""
        if any(self._drops(planned, of) for planned in steps for of in self.groups):
            return True
        for planned in steps:
            for of in self.groups:
                of.note(planned)
        return False

    @staticmethod
    def _drops(planned: PlannedStep, of: EncoderGroup) -> bool:
        """Whether a step may remove tokens of a group."""
        return "exit" in planned.step.effects or of.survivors_of(planned) < of.images.count

    def reduce(
        self,
        steps: list[PlannedStep],
        hidden: Tensor,
        signals: Callable[[Need, EncoderGroup], Tensor],
    ) -> Tensor:
        """Run steps at one site.

        Args:
            steps: the steps.
            hidden: states there.
            signals: a signal of a group.
        """
        for planned in steps:
            if any(self._drops(planned, of) for of in self.groups):
                hidden = self._step(planned, hidden, signals)
            for of in self.groups:
                of.note(planned)
        return hidden

    def _step(
        self, planned: PlannedStep, hidden: Tensor, signals: Callable[[Need, EncoderGroup], Tensor]
    ) -> Tensor:
        step, changed = planned.step, False
        padded = self.reduced or not self.layout.packed
        groups: list[EncoderGroup] = []
        values: list[Tensor] = []
        for number, of in enumerate(self.groups):
            x, reduction = self.layout.take(hidden, number), None
            if self._drops(planned, of):
                found = told(self, planned, of, signals)
                shown = functools.partial(self.shown, planned, number, x, found)
                reduction = decided(planned, of, x, shown, self.family.model_type)
            if reduction is None:
                parts = [(of, x)]
            else:
                parts, changed = apart(planned, of, x, reduction, padded=padded), True
            for part, value in parts:
                groups.append(part)
                values.append(value)
        if not changed:
            return hidden
        if len(groups) > len(self.groups):
            self.layout = self.layer.layout = PatchLayout(groups, self.layout.shape, self.encoder)
            self._memory = {}
        # The first hidden state is captured after the steps before layer 0.
        first = 0 if step.layer == 0 and not step.inside else step.layer + 1
        hidden = self.layout.put(hidden, values, first)
        self._proportional |= "proportional" in step.effects
        self._weigh(hidden)
        return hidden

    def attend(self, planned: PlannedStep, *parts: Any) -> Tensor:
        """(B, N, H, d) attention of the layer that is running, as a method computes it.

        Args:
            planned: the step.
            parts: see `RunningLayer.attention`.
        """
        assert self.layer.input is not None  # set before every layer
        layer, x = self.layer.attention(planned, *parts), self.layout.take(self.layer.input, 0)
        quota = self.groups[0].survivors_of(planned)
        mixed = planned.method.attend(self.shown(planned, 0, x, quota=quota), layer)
        return mixed if self.reduced else self.encoder.specials_apart(mixed)

    def shown(
        self,
        planned: PlannedStep,
        number: int,
        x: Tensor,
        signals: Mapping[str, Tensor] | None = None,
        quota: int = 0,
    ) -> VisualTokens:
        """What a step's method is shown of the group of a number, whose values are (G, K, R D)."""
        of = self.groups[number]
        return of.images.visual_tokens(
            planned,
            functools.partial(mean_of_rows, x, of),
            signals,
            quota=quota,
            special=self.encoder.special,
            memory=self._memory.setdefault((planned.method_number, number), {}),
        )

    # -- what layers are told

    def _weigh(self, hidden: Tensor) -> None:
        """Find out what the scores of each key get, and forget what layers were told."""
        counts = self.counts(hidden, merged=self._proportional)
        self.layer.bias = None
        if counts is not None:
            bias = counts.log().to(hidden.dtype).clamp(min=torch.finfo(hidden.dtype).min)
            self.layer.bias = bias.flatten() if self.layout.sequence else bias[:, None, None]
        self._told = None
        if self.layout.padded:
            self._told = PaddedRows(self.layout.rows_of(self.layout.now).clamp(min=0))
        elif self.layout.packed and (order := self.layout.now.order) is not None:
            self._told = PackedRows(order, self.layer.bias)

    def counts(self, hidden: Tensor, *, merged: bool) -> Tensor | None:
        """(B, N) or (N) how many rows that others attend to each row stands for; `None` if all 1.

        Args:
            hidden: states of now.
            merged: whether merged tokens count as often as they have sources, or once.
        """
        parts = [of.counts(of.layout, merged=merged) for of in self.groups]
        if all(part is None for part in parts) and not self.layout.padding:
            return None
        ones = hidden.new_ones(*hidden.shape[:-1], 1, dtype=torch.float32)
        values = [
            torch.ones(of.rows_at(of.layout).shape, device=hidden.device) if part is None else part
            for part, of in zip(parts, self.groups, strict=True)
        ]
        return self.layout.lay(ones, values)[..., 0]

    def tell(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer that is about to run must be told."""
        told = self._translated(kwargs) if self.reduced else dict(kwargs)
        self.layer.rotary = told.get("position_embeddings")
        if self.encoder.shared_rotary and self.reduced:
            cos, sin = (part[0, 0] for part in told["position_embeddings"])
            told["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        return told

    def _translated(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The same once tokens have been removed."""
        places = self.encoder.places
        if self._told is None and (places or kwargs.get("position_embeddings") is not None):
            rows, special = self.layout.rows_of(self.layout.now), self.encoder.special
            padding = torch.arange(rows.shape[1], device=rows.device).clamp(max=special)
            rows = torch.where(rows < 0, padding, rows)
            self._told = BatchRows(rows, special, self.layout.shape[-1] - special, places)
        if self._told is not None:
            kwargs = self._told.translate(kwargs)
        if self.encoder.relative:  # the bias of all rows is resized to as many as there are
            kwargs = {**kwargs, "interpolate_pos_encoding": False}
        if not self.encoder.masks_layers or self.layout.sequence:
            return dict(kwargs)
        given = kwargs.get("attention_mask")
        mask = self.layer.bias
        if mask is not None and given is not None and given.dim() == 2:  # as flash kernels take it
            mask = mask[:, 0, 0] > -1
        return {**kwargs, self.encoder.mask: mask}

    # -- signals

    def pixels_of(self, images: EncoderGroup) -> Tensor:
        """(G, K, P) pixels of a group's surviving tokens."""
        pixels, rows = self.encoder.pixels, self.layout.shape
        if pixels is None:
            whole = pixels_of_rows(self.encoder, self.pixels, rows, self.family.model_type)
            return take_rows(whole[images.rows].flatten(2), images.images.index)
        each = pixels(self.arguments, self.side)
        whole = torch.stack([each[number] for number in images.images.numbers])
        return take_rows(whole, images.images.index)

    def tapped(self, need: Need, of: EncoderGroup) -> Tensor:
        """A signal of the layer that is running, from its own projections."""
        inside = signal_of(need.name).inside
        assert inside is not None  # as planned
        return inside(self.layer, of)

    def at_tokens(self, row: Tensor, of: EncoderGroup) -> Tensor:
        """(G, C, K) of a group's surviving tokens, from (B, C, V R) as `widen` gives it: the mean
        of a token's rows.
        """
        states = torch.nn.functional.pad(row.transpose(1, 2), (0, 0, self.encoder.special, 0))
        states = self.encoder.specials_apart(states)
        return states.flatten(0, 1)[of.rows_at(of.layout)].mean(2).transpose(1, 2)

    def widen(self, row: Tensor) -> Tensor:
        """(B, H, V R) of a signal (B, H, K R) of the surviving rows: each row has that of the
        survivor that its token went into.
        """
        if not self.shortened:
            return row
        special = self.encoder.special
        states = torch.nn.functional.pad(row.transpose(1, 2), (0, 0, special, 0))
        full = self.layout.full_length(states, self.layout.now, 0.0)
        return self.encoder.specials_first(full)[:, special:].transpose(1, 2)

    # -- the way out

    def results(self) -> dict[int, Mapping[str, Any]]:
        """Number of a method with exits -> what it has noted of the pass, which has one group."""
        numbers = dict.fromkeys(s.method_number for s in self.steps if "exit" in s.step.effects)
        return {number: self._memory.get((number, 0), {}) for number in numbers}

    def unpruned(self, states: Tensor) -> Tensor:
        """States of now at full length."""
        if not self.shortened:
            return states
        return self.layout.full_length(states, self.layout.now)

    def restore(self, states: Tensor) -> Tensor:
        """The same after the last layer of a tower that goes on with all rows."""
        states, self.restored = self.unpruned(states), True
        return states

    def point(self, number: int) -> Point | None:
        """The point that a hidden state of the output is from; `None` for full length."""
        whole = self.restored and number >= len(self.encoder.layers)
        return None if whole else self.layout.at(number)
