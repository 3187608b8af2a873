"""Partial layers in a forward: which layers compute less of visual tokens, and what they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.engine.cache import WORK, PrunedLayer
from foveate.engine.cache_argument import cache_of
from foveate.engine.extensions.base import Extension, Kwargs
from foveate.engine.extensions.partial.decode import Unread, additive, run_step
from foveate.engine.extensions.partial.prefill import Images, Split, run_layer
from foveate.engine.plan import Plan
from foveate.engine.slots import Slots

UNREAD = "unread"  # what heads do not read, attached to layers where some read no visual tokens


class PartialPrefill(Extension):
    """Layers of a forward over a prompt, or over several tokens after one."""

    tracks_visual = True

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        self._made: dict[int, tuple[Slots, Split | None]] = {}  # id of slots -> them, their split
        self._splits: dict[int, Split] = {}  # decoder layer -> its split

    def runs(self, number: int) -> bool:
        """Whether the layer computes less of this forward's images."""
        return number in self.plan.work and bool(self.forward.groups)

    def see(self, number: int, slots: Slots, held: PrunedLayer | None) -> None:
        """Split the columns that the layer is given into visual ones and others."""
        work = self.plan.work.get(number)
        if held is not None and self.forward.groups and held.attached.get(WORK) != work:
            held.attach(WORK, work)
        if work is None:
            return
        if id(slots) not in self._made:
            self._made[id(slots)] = slots, self._split(slots)
        split = self._made[id(slots)][1]
        if split is not None and (split.images or work.visual_blind):
            self._splits[number] = split

    def run(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Run a layer that computes less of visual tokens."""
        if number not in self._splits:
            return None
        mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
        work, split = self.plan.work[number], self._splits[number]
        return run_layer(layer, work, split, hidden, kwargs["position_embeddings"], mask, cache)

    def record(self) -> Mapping[str, Any]:
        """Layers whose caches hold text alone, and text tokens that images look at."""
        split = next(iter(self._splits.values()), None)
        common = split.text_keys[0].shape[1] if split is not None and split.images else 0
        return {"text_only_layers": self.plan.text_only_layers, "common_tokens": common}

    def _split(self, slots: Slots) -> Split | None:
        visual, forward = slots.all_visual, self.forward
        if visual is None:
            return None
        layout, prompt = forward.layout, forward.prompt
        position, keys = layout.index + prompt.past, slots.index
        position = position.masked_fill(layout.index < 0, -1)
        if prompt.real is not None:
            position, keys = (
                x.masked_fill(~prompt.real.gather(1, x.clamp(min=0)), -1) for x in (position, keys)
            )
        images = [
            Images(
                forward.row_index(group),
                forward.columns_of(group, layout),
                group.index if group.index.shape[1] < group.shape.total else None,
                group.shape.frames,
                group.shape.grid,
                forward.seen(group),
            )
            for group in forward.groups
            if group.index.shape[1]
        ]
        return Split.of(images, position, keys, visual)


class PartialDecode(Extension):
    """Layers of a decoding step in which some heads read no visual tokens."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        self._added: dict[int, tuple[Any, Tensor | None]] = {}  # id of a mask -> it, what it adds

    def run(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Run a layer for one token of each row, if heads of it read less than the layer would."""
        work, held = self.plan.visual_blind.get(number), self.forward.held(number)
        if work is None or held is None or held.incoming.visual is None:
            return None
        mask, visual = kwargs.get("attention_mask"), held.incoming.visual
        slots = held.incoming.count if mask is None else mask.shape[-1]
        unread: Unread | None = held.attached.get(UNREAD)
        if unread is None or not unread.serves(visual, slots):
            unread = Unread.of(layer.self_attn, work, visual, slots, hidden.dtype)
            held.attach(UNREAD, unread)
        if unread.mask is None:
            return None
        if id(mask) not in self._added:
            self._added[id(mask)] = mask, additive(mask, hidden.dtype)
        masks = unread.mask[..., :slots], self._added[id(mask)][1]
        rotary, cache = kwargs["position_embeddings"], cache_of(kwargs)
        return run_step(layer, work, masks, hidden, rotary, cache)
