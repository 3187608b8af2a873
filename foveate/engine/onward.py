"""Onward: a forward that goes on behind a pruned cache and has no images of its own.

Nothing is removed in it. Layers that share slots are told alike, and most of them nothing: so a
decoding step does its work once for each place where tokens were removed, not for each layer.
Shapes: `B` batch, `T` tokens of the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.engine.cache import PrunedStaticLayer
from foveate.engine.layout import Layout, Slots, translate_mask
from foveate.models import Family


class Onward:
    """One forward behind a cache of which some layers are pruned.

    Args:
        family: the model's family.
        cache: the cache.
        layout: the (B, T) columns of the forward, all of which are there.
        flash: whether the attention kernel takes 2-D masks.
    """

    def __init__(self, family: Family, cache: Cache, layout: Layout, flash: bool) -> None:
        self.family, self.layout, self.flash = family, layout, flash
        # Per layer, the slots that it holds before the forward, if it is pruned.
        self._before: list[Slots | None] = [getattr(held, "slots", None) for held in cache.layers]
        self._layers = cache.layers
        self._views: dict[tuple[int, ...], tuple[Slots, dict[str, Any]]] = {}
        self._rotary: dict[tuple[int, int], Any] = {}

    def enter(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Tell a layer's cache what it is about to hold.

        Args:
            number: the decoder layer.
            hidden: (B, T, D) its input.
            kwargs: its keyword arguments, in logical terms.

        Returns:
            The keyword arguments in physical terms, or `None` where nothing changes.
        """
        before = self._before[number]
        if before is None:
            return None
        # The mask and the rotary embedding differ between kinds of layers in some models.
        key = id(before), id(kwargs.get("attention_mask")), id(kwargs["position_embeddings"])
        if key not in self._views:
            self._views[key] = self._view(number, before, hidden, kwargs)
        held: Any = self._layers[number]
        held.incoming, changes = self._views[key]
        return {**kwargs, **changes} if changes else None

    def _view(
        self, number: int, before: Slots, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Slots, dict[str, Any]]:
        """Slots behind the forward of layers that share those before, and what they are told."""
        length = self.layout.index.shape[1]
        after = before.extend(self.layout, length, None)
        held, mask = self._layers[number], kwargs.get("attention_mask")
        width = held.max_cache_len if isinstance(held, PrunedStaticLayer) else 0
        physical = translate_mask(mask, self.layout, after, length, two_d=self.flash, width=width)
        changes: dict[str, Any] = {} if physical is mask else {"attention_mask": physical}
        if before.renumbered is not None:
            changes |= self._renumbered(number, before.renumbered, hidden, kwargs)
        return after, changes

    def _renumbered(
        self, number: int, shift: Tensor, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Position ids less a (B, 1) shift, and their rotary embedding."""
        given = id(kwargs["position_embeddings"])
        logical = kwargs["position_ids"]  # which text models with plain positions hand to layers
        if (given, id(shift)) not in self._rotary:
            shifts = [shift] if self.family.rotary_by_length else self._shifts()
            positions = torch.cat([logical - each for each in shifts])
            rotary = self.family.rotary(hidden, positions, number)
            parts = zip(*(part.chunk(len(shifts)) for part in rotary), strict=True)
            self._rotary |= {
                (given, id(each)): part for each, part in zip(shifts, parts, strict=True)
            }
        # Flash kernels read gaps in the position ids of a single row as packed sequences.
        return {
            "position_embeddings": self._rotary[given, id(shift)],
            "position_ids": None if self.flash else logical - shift,
        }

    def _shifts(self) -> list[Tensor]:
        """What renumbering has taken off each row, (B, 1), in all layers."""
        all_slots = [slots for slots in self._before if slots is not None]
        shifts = {id(slots.renumbered): slots.renumbered for slots in all_slots}
        return [shift for shift in shifts.values() if shift is not None]
