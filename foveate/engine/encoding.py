"""Encoding: the state of one pass through a vision encoder; gone when it ends.

All images of a pass have the same number of tokens and lose the same number of them, so the pass
stays rectangular. Shapes: `B` images, `S` special tokens before the patches, `V` patches of an
image, `K` of them alive, `N = S + K` rows, `D` hidden, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.engine.plan import PlannedStep
from foveate.errors import InputError
from foveate.models import Encoder, Family
from foveate.reduction import Reduction
from foveate.signals.cls_attention import class_row
from foveate.tokens import VisualTokens


class Encoding:
    """One pass: what is alive at each layer, and how to get back to full length.

    Args:
        family: for the grid of an image.
        encoder: the encoder.
        pixels: what it is fed.
    """

    def __init__(self, family: Family, encoder: Encoder, pixels: Tensor | None) -> None:
        self.family = family
        self.encoder = encoder
        self.pixels = pixels
        self.images = 0
        self.total = 0
        self.layout: Reduction | None = None  # from all patches to those alive
        self.merged: Tensor | None = None  # (B, K) sizes, once a merge has happened
        self.bias: Tensor | None = None  # (B, 1, 1, N) log sizes, for proportional attention
        self.kept: dict[str, Tensor] = {}
        self.rows: list[tuple[int, int]] = []  # (N of the attention, N of the MLP) of each layer
        self.taps: dict[str, Tensor] | None = None  # projections of the layer that is running
        self._raster = torch.empty(0)
        self._proportional = False
        self._begin: dict[int, int] = {}
        self._history: list[tuple[int, Reduction]] = []  # (first hidden state it holds for, layout)

    def see(self, states: Tensor) -> None:
        """Learn the size of the images from (B, S + V, D) states."""
        if not self.total:
            self.images, self.total = states.shape[0], states.shape[1] - self.encoder.special
            self._raster = torch.arange(self.total, device=states.device).expand(self.images, -1)

    # -- steps

    def removes(self, steps: list[PlannedStep]) -> bool:
        """Whether any of some steps removes anything; if none does, they are noted as done."""
        if any(self._count(planned) < self.alive for planned in steps):
            return True
        for planned in steps:
            self._note(planned)
        return False

    def _count(self, planned: PlannedStep) -> int:
        """How many patches of each image survive a step."""
        total = self._begin.get(planned.method_number, self.alive)
        return planned.method.count(self.alive, total, planned.step, planned.number)

    def reduce(
        self, steps: list[PlannedStep], hidden: Tensor, signals: Callable[[str], Tensor]
    ) -> Tensor:
        """Run steps at one place.

        Args:
            steps: the steps.
            hidden: (B, N, D) states there.
            signals: a signal by name.
        """
        for planned in steps:
            self._begin.setdefault(planned.method_number, self.alive)
            count = self._count(planned)
            if count < self.alive:
                needed = {need.name: signals(need.name) for need in planned.step.needs}
                hidden = self._step(planned, count, hidden, needed)
            self._note(planned)
        return hidden

    def _step(
        self, planned: PlannedStep, count: int, hidden: Tensor, signals: Mapping[str, Tensor]
    ) -> Tensor:
        special, step = self.encoder.special, planned.step
        tokens = VisualTokens(
            features=lambda: hidden[:, special:],
            index=self.index,
            grid=self.grid,
            rows=tuple(range(self.images)),
            signals=signals,
            merged=self.merged,
            special=special,
            place=step.place,
        )
        reduction = planned.method.reduce(tokens, count)
        layout = self.layout
        self.layout = reduction if layout is None else layout.then(reduction, self.total)
        if self.merged is not None or reduction.merges:
            self.merged = self.layout.sizes(self.total)
        self._proportional |= step.proportional
        if self._proportional and self.merged is not None:
            log = torch.nn.functional.pad(self.merged.log(), (special, 0))
            self.bias = log.to(hidden.dtype)[:, None, None]
        # The first hidden state is captured behind the steps before layer 0.
        first = 0 if step.layer == 0 and not step.inside else step.layer + 1
        self._history.append((first, self.layout))
        return reduction.behind(special).apply(hidden)

    def _note(self, planned: PlannedStep) -> None:
        self._begin.setdefault(planned.method_number, self.alive)
        self.kept[planned.step.place] = self.index

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of each image's patches."""
        patch = getattr(self.encoder.tower.config, "patch_size", None)
        if isinstance(patch, int) and self.pixels is not None and self.pixels.dim() == 4:
            height, width = (side // patch for side in self.pixels.shape[-2:])
            if height * width == self.total:
                return height, width
        return self.family.grid(self.total)

    @property
    def alive(self) -> int:
        """Patches of each image that are alive."""
        return self.total if self.layout is None else self.layout.kept

    @property
    def index(self) -> Tensor:
        """(B, K) raster positions alive, in the order of the rows."""
        return self._raster if self.layout is None else self.layout.index

    # -- signals

    def tapped(self, name: str) -> Tensor:
        """A signal of the layer that is running, from its own projections."""
        special, heads = self.encoder.special, self.encoder.heads
        assert self.taps is not None  # only asked for between the halves of a layer
        key = self.taps["k_proj"].detach()
        if name == "encoder_keys":
            return key[:, special:].unflatten(-1, (heads, -1)).transpose(1, 2)[:, None]
        return class_row(self.taps["q_proj"].detach(), key, heads, special, self.bias)[:, None]

    @torch.no_grad()
    def ahead(self, layer: Any, hidden: Tensor) -> Tensor:
        """(B, 1, H, K) class-token attention of a layer that is about to run."""
        block = self.encoder.block
        assert block is not None  # checked in the plan
        normed = getattr(layer, block.norm1)(hidden)
        attention = self.encoder.attention(layer)
        query, key = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
        row = class_row(query, key, self.encoder.heads, self.encoder.special, self.bias)
        return row[:, None]

    def widen(self, row: Tensor) -> Tensor:
        """(B, H, V) of a signal (B, H, K): each patch has that of the survivor it went into."""
        if self.layout is None:
            return row
        return self.layout.recover(row.transpose(1, 2), self.total).transpose(1, 2)

    # -- the way out

    def mask(self, given: Tensor | None) -> Tensor | None:
        """The attention mask of a layer, once tokens have been removed.

        Raises:
            InputError: the encoder was given a mask that hides some tokens.
        """
        if given is not None and given is not self.bias and _hides(given):
            raise InputError(
                "images are padded (the encoder was given an attention mask), and tokens cannot "
                "be removed inside the encoder then; pass images of equal size, without padding"
            )
        return self.bias

    def leave(self, output: Any) -> Any:
        """Bring what the encoder returns back to full length, in place."""
        if self.layout is None:
            return output
        output.last_hidden_state = self._recover(output.last_hidden_state, self.layout)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(
                self._recover(states, self._layout_at(number))
                for number, states in enumerate(output.hidden_states)
            )
        return output

    def _layout_at(self, number: int) -> Reduction | None:
        layouts = [layout for first, layout in self._history if first <= number]
        return layouts[-1] if layouts else None

    def _recover(self, states: Tensor | None, layout: Reduction | None) -> Tensor | None:
        """(B, S + V, D); rows of dropped tokens get the mean of what is left of the image, so that
        a head which averages all rows sees that mean.
        """
        if states is None or layout is None:
            return states
        special = self.encoder.special
        patches = states[:, special:]
        share = layout.sizes(self.total)[..., None].to(patches.dtype)
        mean = (patches * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        full = layout.recover(patches, self.total, mean)
        return torch.cat((states[:, :special], full), 1)


def _hides(mask: Tensor) -> bool:
    return not bool(mask.all()) if mask.dtype == torch.bool else bool(mask.ne(0).any())
