"""Encoding: the state of one pass through a vision encoder, which ends with the pass.

The images of a pass may be the rows of a batch. Then all have equally many tokens, and lose equally
many. Or they follow one another in one sequence, or are rows that the encoder pads, and each group
of them has counts of its own. Shapes: `G` images of a group, `S` special rows before the patches,
`V` visual tokens of an image, `K` of them surviving, `R` rows of a token, `D` hidden, `H` heads;
`N` rows of one image of a batch, or of all the sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import LayerAttention, LayerShape, Need, VisualTokens
from foveate.core.attention import Kernel
from foveate.core.tokens import Shape
from foveate.engine.attentions import spread
from foveate.engine.images import Kept
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around
from foveate.engine.vision.encoder_group import EncoderGroup, encoder_groups, patch_grid
from foveate.engine.vision.exits import Exits
from foveate.engine.vision.patch_layout import PatchLayout, Point
from foveate.engine.vision.segments import BatchRows, PackedRows, PaddedRows
from foveate.errors import FoveateError, InputError, UnsupportedModelError
from foveate.families import Encoder, Family
from foveate.families.rows import EncoderImage, raster_rows, token_grid
from foveate.signals.cls_attention import class_row
from foveate.signals.encoder_hooks import hides, signal_of
from foveate.signals.rotary import rotated, rotated_class


@dataclass(frozen=True, eq=False)
class Entered:
    """What goes through a layer that a step acts around.

    Args:
        rows: (B, S + M R, D) the layer's input.
        tokens: what the method is shown.
        values: (G, V, R D) of all tokens before the layer.
    """

    rows: Tensor
    tokens: VisualTokens
    values: Tensor


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
        self.taps: dict[str, Tensor] | None = None  # projections of the layer that is running
        self.bias: Tensor | None = None  # (B, 1, 1, N) or (N) what keys' scores get
        self.scores: Tensor | None = None  # (B, H, N, N) the same of a kernel's, where relative
        self.input: Tensor | None = None  # of the layer that is running
        self.normed: Tensor | None = None  # the same, as its attention is given it
        self._memory: dict[tuple[int, int], dict[str, Any]] = {}  # of a method and a group
        self.rotary: Any = None  # of the rows of now, in the layer that is running
        self.turning = False  # whether a layer is running whose projections turn by those
        self._proportional = False
        self._told: BatchRows | PackedRows | PaddedRows | None = None  # for the rows that remain
        self._restored = False

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
        if self.encoder.masks_kernels:
            self._check_unmasked()
            mask = None
        encoder_images = self._encoder_images(*states.shape[:2])
        groups = encoder_groups(encoder_images, states.device, self.readout)
        self.layout = PatchLayout(groups, states.shape[:-1], self.encoder)
        if mask is None or self.layout.packed or (hidden := hides(mask)) is None:
            return
        for planned in self.steps:
            if planned.step.whole or "exit" in planned.step.effects:
                raise UnsupportedModelError(
                    f"{planned.method.slug} does not act on images that the encoder pads; encode "
                    "images of one size together, without padding"
                )
        visible = (~hidden).expand(len(encoder_images), -1).flatten().float()
        groups[0].visible = visible[groups[0].rows]

    def _check_unmasked(self) -> None:
        if self.arguments.get("attention_mask") is not None:
            raise InputError(
                "an attention_mask that hides patches is not supported where tokens are removed "
                "inside this encoder; leave it out, or do without methods"
            )

    def _encoder_images(self, images: int, length: int) -> list[EncoderImage]:
        """The images of a sequence, or `images` of `length` rows each."""
        if self.encoder.packed is not None:
            return self.encoder.packed(self.arguments, self.side)
        frames, height, width = self._patches(length - self.encoder.special)
        grid = token_grid(height, width, self.side)
        rows = self.encoder.leading + raster_rows(frames * height, width, self.side)
        return [EncoderImage(grid, rows + n * length, frames) for n in range(images)]

    def _patches(self, count: int) -> tuple[int, int, int]:
        """(frames, height, width) of an image's patches, or a video's.

        Raises:
            InputError: some of them are hidden from the encoder.
        """
        if self.encoder.patches is None:
            return 1, *self._grid(count)
        sizes = self.encoder.patches(self.arguments)
        if math.prod(sizes) != count:
            raise InputError(
                f"the encoder sees {count} of {math.prod(sizes)} patches of each video, as a mask "
                "hides the others, and which these are methods cannot know; leave the mask out, or "
                "do without methods"
            )
        return sizes

    def _grid(self, count: int) -> tuple[int, int]:
        """(height, width) of an image's patches."""
        return patch_grid(self.family, self.encoder.tower.config, self.pixels, count)

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
        return self.layout.now.order is not None

    @property
    def shortened(self) -> bool:
        """Whether states of now lack tokens that have been removed."""
        return self.reduced and not self._restored

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
        values = [self.layout.take(hidden, number) for number in range(len(self.groups))]
        for number, of in enumerate(self.groups):
            if not self._drops(planned, of):
                continue
            x, count, images = values[number], of.survivors_of(planned), of.images
            told = {need.name: signals(need, of) for need in step.needs}
            tokens = self._shown(planned, number, x, told, quota=count)
            reduce = functools.partial(planned.method.reduce, tokens)
            reduction = reduce_around(reduce, count, images.required, ascending=False)
            if reduction.values is not None and of.rows.shape[2] > 1:
                raise UnsupportedModelError(
                    f"{planned.method.slug} makes tokens of its own, but in the encoder of this "
                    f"{self.family.model_type!r} a token has {of.rows.shape[2]} rows"
                )
            if "exit" in step.effects:
                if of.keeps_all(reduction):
                    continue
                of.exits = of.exits or Exits(planned, tokens)
                of.exits.note(x, of.layout)
            values[number], changed = reduction.apply(x), True
            of.reduce(reduction, planned)
        if not changed:
            return hidden
        # The first hidden state is captured after the steps before layer 0.
        first = 0 if step.layer == 0 and not step.inside else step.layer + 1
        hidden = self.layout.put(hidden, values, first)
        self._proportional |= "proportional" in step.effects
        self._weigh(hidden)
        return hidden

    def attend(
        self,
        planned: PlannedStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        kernel: Kernel,
    ) -> Tensor:
        """(B, N, H, d) attention of the layer that is running, as a method computes it.

        Raises:
            UnsupportedModelError: the method reads whole grids, and the rows are no such grid.
        """
        assert self.input is not None  # set before every layer
        assert self.normed is not None  # and this before every attention
        rows, states = self.groups[0].rows[0], self.normed
        if not self.reduced:
            rows, states = rows + self.encoder.trailing, self.encoder.specials_first(states)
            query, key, value = (
                self.encoder.specials_first(part.transpose(1, 2)).transpose(1, 2)
                for part in (query, key, value)
            )
        else:  # those of a token follow one another
            tokens = self.groups[0].images.count
            rows = torch.arange(tokens * rows.shape[1], device=rows.device).view(tokens, -1)
            rows = rows + self.encoder.special
        of = self.layer_shape
        grid = of.special + of.frames * of.grid[0] * of.grid[1]
        if planned.step.whole and (mask is not None or of.rows != grid):
            raise UnsupportedModelError(
                f"{planned.method.slug} computes attention by the grid of patches, but the "
                f"{of.rows} rows of encoder layer {planned.step.layer} of this "
                f"{self.family.model_type} are masked, or no grid of {of.grid[0]} x {of.grid[1]}"
            )
        layer = LayerAttention(query, key, value, mask, scaling, rows, states, of, kernel)
        x = self.layout.take(self.input, 0)
        quota = self.groups[0].survivors_of(planned)
        mixed = planned.method.attend(self._shown(planned, 0, x, quota=quota), layer)
        return mixed if self.reduced else self.encoder.specials_apart(mixed)

    @property
    def layer_shape(self) -> LayerShape:
        """What there is of each image in the attention of the layer that is running."""
        assert self.normed is not None  # set before every attention
        of = self.groups[0]
        height, width = of.images.shape.grid
        side = math.isqrt(of.rows.shape[2])
        return LayerShape(
            self.normed.shape[-2],
            self.encoder.special,
            (height * side, width * side),
            of.images.shape.frames,
            self.normed.shape[-1],
        )

    def enter(
        self,
        planned: PlannedStep,
        hidden: Tensor,
        signals: Callable[[Need, EncoderGroup], Tensor],
    ) -> Entered:
        """What goes through the layer that is about to run, where a step acts around it.

        Args:
            planned: the step.
            hidden: the layer's input.
            signals: a signal of a group.

        Raises:
            FoveateError: the method hands over another number of tokens than it promises.
        """
        values = self.layout.take(hidden, 0)
        told = {need.name: signals(need, self.groups[0]) for need in planned.step.needs}
        tokens = self._shown(planned, 0, values, told)
        states = planned.method.enter(tokens, values)
        promised = planned.method.entering(values.shape[1], planned.step)
        if states.shape[1] != promised:
            raise FoveateError(
                f"{planned.method.slug} promises that {promised} of {values.shape[1]} tokens go "
                f"through encoder layer {planned.step.layer}, but hands over {states.shape[1]}"
            )
        specials = hidden if self.reduced else self.encoder.specials_first(hidden)
        rows = self.layout.lay(specials, [states])
        self.rows[-1] = rows.shape[-2], rows.shape[-2]
        return Entered(rows, tokens, values)

    def leave_layer(self, planned: PlannedStep, entered: Entered, output: Tensor) -> Tensor:
        """(B, N, D) states of all tokens after that layer, from its output."""
        cell = self.groups[0].rows.shape[2]
        passed = output[:, self.encoder.special :].unflatten(1, (-1, cell)).flatten(2)
        values = planned.method.leave(entered.tokens, entered.values, passed)
        place = self.layout.lay if self.reduced else self.layout.place
        return place(output, [values])

    def _shown(
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
            functools.partial(_mean, x, of),
            signals,
            quota=quota,
            special=self.encoder.special,
            memory=self._memory.setdefault((planned.method_number, number), {}),
        )

    # -- what layers are told

    def _weigh(self, hidden: Tensor) -> None:
        """Find out what the scores of each key get, and forget what layers were told."""
        counts = self.counts(hidden, merged=self._proportional)
        self.bias = None
        if counts is not None:
            bias = counts.log().to(hidden.dtype).clamp(min=torch.finfo(hidden.dtype).min)
            self.bias = bias.flatten() if self.layout.sequence else bias[:, None, None]
        self._told = None
        if self.layout.padded:
            self._told = PaddedRows(self.layout.rows_of(self.layout.now).clamp(min=0))
        elif self.layout.packed and (order := self.layout.now.order) is not None:
            self._told = PackedRows(order, self.bias)

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
        self.rotary = told.get("position_embeddings")
        if self.encoder.shared_rotary and self.reduced:
            cos, sin = (part[0, 0] for part in told["position_embeddings"])
            told["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        return told

    def _translated(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The same once tokens have been removed."""
        if self._told is None and kwargs.get("position_embeddings") is not None:
            rows, special = self.layout.rows_of(self.layout.now), self.encoder.special
            padding = torch.arange(rows.shape[1], device=rows.device).clamp(max=special)
            rows = torch.where(rows < 0, padding, rows)
            self._told = BatchRows(rows, special, self.layout.shape[-1] - special)
        if self._told is not None:
            kwargs = self._told.translate(kwargs)
        if self.encoder.relative:  # the bias of all rows is resized to as many as there are
            kwargs = {**kwargs, "interpolate_pos_encoding": False}
        if not self.encoder.masks_layers or self.layout.sequence:
            return dict(kwargs)
        given = kwargs.get("attention_mask")
        mask = self.bias
        if mask is not None and given is not None and given.dim() == 2:  # as flash kernels take it
            mask = mask[:, 0, 0] > -1
        return {**kwargs, "attention_mask": mask}

    def kernel_mask(self, given: Tensor | None) -> Tensor | None:
        """What a kernel is handed as a mask, where it gets one of no other.

        Args:
            given: (B or 1, H or 1, N, N) what the layer hands it, for all rows.
        """
        mask = given
        if self.reduced and not self._restored:
            rows = self.layout.rows_of(self.layout.now).clamp(min=0)
            mask = self.bias
            if given is not None:
                mask = _between(given, rows) + (0 if self.bias is None else self.bias)
        self.scores = mask if self.encoder.relative else None
        return mask

    # -- signals

    def tapped(self, need: Need, of: EncoderGroup) -> Tensor:
        """A signal of the layer that is running, from its own projections."""
        inside = signal_of(need.name).inside
        assert inside is not None  # as planned
        return inside(self, of)

    def keys(self, of: EncoderGroup) -> Tensor:
        """(G, 1, H, K, d) keys of tokens in the layer that is running: the mean of their rows'."""
        assert self.taps is not None  # only asked for between the halves of a layer
        _, key, *_ = self.encoder.projected([self.taps[name] for name in self.encoder.projections])
        key = _mean(self._of(key.detach(), of), of)
        heads = self.encoder.heads_of(key.shape[-1])
        return key.unflatten(-1, (heads, -1)).transpose(1, 2)[:, None]

    def class_attention(self, of: EncoderGroup) -> Tensor:
        """(G, 1, H, K) attention of the class token in the layer that is running."""
        assert self.taps is not None  # only asked for between the halves of a layer
        query, key = (self.taps[part].detach() for part in self.encoder.projections)
        return self._of_class(query[:, :1], key, of)

    @torch.no_grad()
    def ahead(self, layer: Any, hidden: Tensor, of: EncoderGroup) -> Tensor:
        """(B, 1, H, K) class-token attention of a layer that is about to run."""
        block, attention = self.encoder.block, self.encoder.attention(layer)
        assert block is not None  # checked in the plan
        normed = getattr(layer, block.norm1)(hidden)
        query, key = (getattr(attention, name) for name in block.matrices[:2])
        query, key = query(normed[:, :1]), key(normed)
        if block.norms:
            query, key = (
                getattr(attention, name)(part)
                for name, part in zip(block.norms, (query, key), strict=True)
            )
        return self._of_class(query, key, of)

    def _of_class(self, query: Tensor, key: Tensor, of: EncoderGroup) -> Tensor:
        """(B, 1, H, K) attention of the class token to tokens: to all their rows.

        Args:
            query: (B, 1, D) of the class token.
            key: (B, N, D).
            of: whose tokens.
        """
        special, heads = self.encoder.special, self.encoder.heads_of(query.shape[-1])
        query = rotated_class(query, self.rotary, heads, key.shape[1])
        key = rotated(key, self.rotary, heads)
        if not self.reduced:
            key = self.encoder.specials_first(key)
        bias = self.scores if self.encoder.relative else self.bias
        row = class_row(query, key, heads, special, bias).transpose(1, 2)
        row = torch.nn.functional.pad(row, (0, 0, special, 0))
        tokens = self._of(row if self.reduced else self.encoder.specials_apart(row), of)
        return tokens.unflatten(2, (-1, row.shape[2])).sum(2).transpose(1, 2)[:, None]

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

    def _of(self, states: Tensor, of: EncoderGroup) -> Tensor:
        """(G, K, R D) of a group's tokens, from states of now."""
        return self.layout.take(states, self.groups.index(of))

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
        states, self._restored = self.unpruned(states), True
        return states

    def whole(self, outputs: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Outputs of layers at full length."""
        points = [self._point(number + 1) for number in layers]
        return [
            states if point is None else self.layout.full_length(states, point)
            for states, point in zip(outputs, points, strict=True)
        ]

    def leave(self, output: Any) -> Any:
        """Bring what the encoder returns back to full length, in place."""
        if not self.reduced:
            return output
        merged = None  # what is made of the last rows, which may stand for the last hidden state
        if self.encoder.returns_rows:
            output.last_hidden_state = self.unpruned(output.last_hidden_state)
        else:
            merged = output.last_hidden_state
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(
                states
                if states is None or states is merged or (point := self._point(number)) is None
                else self.layout.full_length(states, point)
                for number, states in enumerate(output.hidden_states)
            )
        if output.get("attentions"):
            self._widen(output)
        return output

    def _point(self, number: int) -> Point | None:
        """The point that a hidden state of the output is from; `None` for full length."""
        whole = self._restored and number >= len(self.encoder.layers)
        return None if whole else self.layout.at(number)

    def _widen(self, output: Any) -> None:
        """Bring attention maps (B, H, N', N') back to (B, H, N, N), in place.

        Raises:
            UnsupportedModelError: it is not known which map is which layer's.
        """
        maps, layers = output.attentions, len(self.encoder.layers)
        if len(maps) < layers or (len(maps) > layers and not self.encoder.queries):
            raise UnsupportedModelError(
                f"this encoder returns {len(maps)} attention maps of {layers} layers, so that it "
                "is not known which is which; leave output_attentions out"
            )
        output.attentions = tuple(
            of if of is None or (point := self.points.get(n)) is None else self._widened(of, point)
            for n, of in enumerate(maps)
        )

    def _widened(self, of: Tensor, point: Point) -> Tensor:
        """An attention map at full length; some encoders return what attention makes, (N', D)."""
        if point.order is None:
            return of
        if of.dim() != 4:
            return self.layout.full_length(of, point)
        rows, total = self.layout.rows_of(point), self.layout.shape[-1]
        return spread(of, rows, rows, (total, total))


def _between(given: Tensor, rows: Tensor) -> Tensor:
    """(B, H or 1, N', N') of (B or 1, H or 1, N, N), between (B, N') rows."""
    device = given.device
    image = torch.arange(given.shape[0], device=device)[:, None, None, None]
    head = torch.arange(given.shape[1], device=device)[:, None, None]
    rows = rows.to(device)
    return given[image, head, rows[:, None, :, None], rows[:, None, None, :]]


def _mean(x: Tensor, of: EncoderGroup) -> Tensor:
    """(G, K, D) mean of each token's rows, from (G, K, R D)."""
    cell = of.rows.shape[2]
    return x if cell == 1 else x.unflatten(2, (cell, -1)).mean(2)
