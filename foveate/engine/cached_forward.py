"""CachedForward: a forward after a pruned cache, without images of its own.

Nothing is removed in it. Layers that share slots are told alike, and most of them nothing: so a
decoding step does its work once for each place where tokens were removed, not for each layer.
Shapes: `B` batch, `T` tokens of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.engine.attentions import Seen, widen_maps
from foveate.engine.cache import PrunedLayer, PrunedStaticLayer
from foveate.engine.compilation import untraced
from foveate.engine.extensions.base import Extension
from foveate.engine.kernels import takes_2d_masks
from foveate.engine.layout import Layout
from foveate.engine.long_rope import check_switch
from foveate.engine.mask_translation import translate_mask
from foveate.engine.plan import Plan
from foveate.engine.slots import Slots
from foveate.engine.state import Kwargs
from foveate.families.text_facts import TextFacts


class CachedForward:
    """One forward after a cache of which some layers are pruned.

    Args:
        family: the text model, or an expert that reads its cache.
        cache: the cache.
        before: per layer, the slots that it holds before the forward, if it is pruned.
        sequence: (B, T, ...) what the text model is given; all of its columns are there.
    """

    def __init__(
        self, family: TextFacts, cache: Cache, before: list[Slots | None], sequence: Tensor
    ) -> None:
        self.family = family
        self._batch, self._length = sequence.shape[:2]
        self._device = sequence.device
        self._layers: list[Any] = cache.layers
        self._before = before
        self._after: dict[int, Slots] = {}  # id of slots before the forward -> those after it
        self._views: dict[tuple[int, ...], Kwargs] = {}
        self._rotary: dict[tuple[int, int], Any] = {}
        self._named: list[Any] = []  # what keys are ids of, which must last as long as the keys
        self.extensions: list[Extension] = []

    @classmethod
    def after(
        cls,
        plan: Plan,
        family: TextFacts,
        cache: Cache,
        before: list[Slots | None],
        sequence: Tensor,
    ) -> CachedForward | None:
        """A forward after a cache, or `None` where no layer of that is pruned."""
        if not any(before):
            return None
        cached = cls(family, cache, before, sequence)
        cached.extensions = [extension(cached, plan) for extension in plan.cached_extensions]
        cached._announce()
        return cached

    def _announce(self) -> None:
        """Tell pruned layers of the cache what they are about to hold."""
        key = object()  # names the forward to slots that layers share
        for held, before in zip(self._layers, self._before, strict=True):
            if before is not None:
                after = self._after.get(id(before))
                if after is None:
                    after = self._after[id(before)] = before.grow(key, self._length)
                held.incoming = after

    @untraced  # to disable the compiler takes 2 us, so that is done where something is to be made
    def enter(
        self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor, Kwargs]:
        """Tell a layer what it is about to see; arguments and returns as in `ForwardPass.enter`."""
        donor = self.family.donors[number]  # whose keys the layer reads
        before = self._before[donor]
        if before is not None:
            # The mask and the rotary embedding differ between kinds of layers in some models.
            mask, rotary = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
            key = id(before), id(mask), id(rotary)
            changes = self._views.get(key)
            if changes is None:
                changes = self._views[key] = self._view(donor, before, hidden, kwargs)
                self._named.append((mask, rotary))
            kwargs.update(changes)
        output = self._run(number, layer, hidden, kwargs) if self.extensions else None
        return output, hidden, kwargs

    @torch.compiler.disable
    def _run(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor | None:
        """The layer as an extension runs it; `None` where none does."""
        outputs = (extension.run(number, layer, hidden, kwargs) for extension in self.extensions)
        return next((output for output in outputs if output is not None), None)

    def leave(self, output: Any) -> Any:
        """Bring attention maps back to logical length, in place."""
        if output.get("attentions"):
            layout = Layout.full(self._batch, self._length, self._device)
            seen = {
                number: Seen.of(layout, self._after[id(before)], self._layers[donor], self._length)
                for number, donor in enumerate(self.family.donors)
                if (before := self._before[donor]) is not None
            }
            widen_maps(output, self.family, seen, self._length)
        return output

    def held(self, number: int) -> PrunedLayer | None:
        """The cache layer of a decoder layer, if it is pruned."""
        return None if self._before[number] is None else self._layers[number]

    @torch.compiler.disable
    def _view(self, number: int, before: Slots, hidden: Tensor, kwargs: Kwargs) -> dict[str, Any]:
        """What layers are told that share slots."""
        after = self._after[id(before)]
        changes: Kwargs = {}
        mask = kwargs.get("attention_mask")
        static = isinstance(self._layers[number], PrunedStaticLayer)
        if mask is not None or after.ragged or static:
            changes = {"attention_mask": self._mask(number, mask, after, hidden.shape[1])}
        if before.renumbered is not None:
            changes |= self._renumbered(number, before.renumbered, hidden, kwargs)
        return changes

    def _mask(self, number: int, mask: Tensor | None, after: Slots, count: int) -> Tensor | None:
        """The mask of the last `count` tokens, with which the text model goes on."""
        held = self._layers[number]
        width = held.max_cache_len if isinstance(held, PrunedStaticLayer) else 0
        layout = Layout.full(self._batch, count, self._device)
        return translate_mask(mask, layout, after, count, two_d=self._flash, width=width)

    @property
    def _flash(self) -> bool:
        return takes_2d_masks(self.family.text.config._attn_implementation)

    def rotate(self, embed: Callable[[Tensor], Any], positions: Tensor) -> Any:
        """Rotary embeddings of a forward, with which those of renumbered layers are made at once.

        Args:
            embed: makes (cos, sin) of positions, or one complex tensor.
            positions: (B or 1, T) those of the forward.
        """
        shifts = self._shifts
        if not shifts or self.family.rotary_by_length or positions.dim() != 2:
            return embed(positions)
        rows = [positions, *(positions - shift for shift in shifts)]
        sizes = [len(row) for row in rows]
        made = embed(torch.cat(rows))
        if isinstance(made, Tensor):
            given, *others = made.split(sizes)
        else:
            given, *others = zip(*(part.split(sizes) for part in made), strict=True)
        for shift, rotary in zip(shifts, others, strict=True):
            self._rotary[id(given), id(shift)] = rotary
        self._named.append(given)
        return given

    def _renumbered(
        self, number: int, shift: Tensor, hidden: Tensor, kwargs: Kwargs
    ) -> dict[str, Any]:
        """Position ids less a (B, 1) shift, and rotary embeddings of them."""
        rotary, scaled = kwargs.get("position_embeddings"), self.family.scales_by_position
        key, told = (id(rotary), id(shift)), None
        if scaled or key not in self._rotary:
            # Text models with plain positions hand them on to their layers.
            positions = kwargs["position_ids"][..., -hidden.shape[1] :] - shift
            told = positions if scaled else None
            if key not in self._rotary:
                check_switch(self.family, positions, self._layers[number].get_seq_length())
                self._rotary[key] = self.family.rotary(hidden, positions, number)
                self._named.append(rotary)
        # What position ids are left to tell, but for scales, is for flash kernels, which read gaps
        # in those of a single row as packed sequences.
        numbered = {} if rotary is None else {"position_embeddings": self._rotary[key]}
        return {**numbered, "position_ids": told}

    @property
    def _shifts(self) -> list[Tensor]:
        """What renumbering has taken off each row, (B, 1), in all layers."""
        shifts = (slots.renumbered for slots in self._after.values())
        return list({id(shift): shift for shift in shifts if shift is not None}.values())
