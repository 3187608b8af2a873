"""Conversation: with `keep_total`, images that a cache holds make room for those of a new turn.

They give up tokens before any layer sees the new ones. What each gives up first was settled when it
came (`foveate.engine.total.ranking`). Survivors stay at their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.engine.cache import PrunedLayer
from foveate.engine.caches import WITHOUT_SLOTS, pruned_layer
from foveate.engine.extensions.base import Extension
from foveate.engine.plan import Plan
from foveate.engine.slots import Slots
from foveate.engine.total import IMAGES, CachedImages, Room, cached_images
from foveate.errors import CacheError


class Conversation(Extension):
    """Makes room in the cache for the images of a forward, and notes where they are."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        self._columns: list[list[Tensor]] | None = None
        self._room: Room | None = None

    def begin(self, cache: Any, request_of: Callable[[int], int]) -> None:
        """Before the text model: let the cache forget so much of earlier images that new ones have
        room.
        """
        prompt, total = self.forward.prompt, self.plan.total
        if prompt.past and not prompt.groups:
            return  # text after a cache changes nothing
        assert total is not None  # else the session has no such extension
        if not prompt.groups:
            self._columns = [[] for _ in range(prompt.batch)]
            return
        held = cached_images(cache, prompt.past, prompt.batch)
        room = self._room = Room.of(total, cache, prompt.past, prompt.batch, request_of)
        new = self._new()
        gone = torch.zeros(prompt.batch, prompt.past, dtype=torch.bool)
        self._columns = []
        for row, images in enumerate(held):
            counts = room.share(row, [len(columns) for columns in new[row]])[0]
            for columns, count in zip(images, counts, strict=True):
                gone[row, columns[count:]] = True
            left = [columns[:count] for columns, count in zip(images, counts, strict=True)]
            self._columns.append([*left, *new[row]])
        if bool(gone.any()):
            self._forget(cache, gone.to(prompt.device))

    def _new(self) -> list[list[Tensor]]:
        """Of each row, of each new image, (K) logical positions in the whole sequence."""
        prompt = self.forward.prompt
        found: list[dict[int, Tensor]] = [{} for _ in range(prompt.batch)]
        for group in prompt.groups:
            for image, columns in zip(group.images, group.columns.cpu(), strict=True):
                order = slice(None) if image.order is None else image.order.cpu()
                found[image.row][image.number] = prompt.past + columns[order]
        return [[of[number] for number in sorted(of) if len(of[number])] for of in found]

    def _forget(self, cache: Any, gone: Tensor) -> None:
        """Evict (B, past) logical positions from every layer of a cache.

        Raises:
            CacheError: a layer has mixed them into a running state.
        """
        if self.forward.family.recurrent_layers:
            raise CacheError(
                "keep_total wants images of earlier turns to shrink, but recurrent layers of this "
                f"{self.forward.family.model_type} have mixed them into a running state, from "
                "which no token can be taken; run the whole conversation anew, without the cache"
            )
        full = Slots.full(gone.shape[0], gone.shape[1], gone.device)
        kept: dict[Slots, tuple[Slots, Tensor]] = {}  # layers that share slots go on sharing
        for number, layer in enumerate(cache.layers):
            if type(layer) in WITHOUT_SLOTS:
                continue
            held = pruned_layer(cache, number, full, 0)
            assert held.slots is not None
            if held.slots not in kept:
                kept[held.slots] = held.slots.without(gone)
            held.evict(*kept[held.slots])

    def runs(self, number: int) -> bool:
        """The first layer that sees the whole sequence: its cache layer notes the images."""
        return bool(self._columns is not None and number == self.forward.family.attention_layers[0])

    def see(self, number: int, slots: Slots, held: PrunedLayer | None) -> None:
        """Note the images that the cache holds."""
        if held is not None and self.runs(number):
            assert self._columns is not None
            held.attach(IMAGES, CachedImages(self._columns))

    def record(self) -> Mapping[str, Any]:
        """What each row may hold, and what it holds of earlier turns."""
        if self._room is None or self._columns is None:
            return {}
        new = [len(of_row) for of_row in self._new()]
        earlier = [
            sum(map(len, images[: len(images) - count]))
            for images, count in zip(self._columns, new, strict=True)
        ]
        return {"keep_total": list(self._room.totals), "earlier_tokens": earlier}
