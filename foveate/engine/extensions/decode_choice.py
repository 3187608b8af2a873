"""Decode choice: a decoding step's own choice among the visual tokens in the cache.

The choice is a mask in logical terms, which later layers are handed in place of their own; it
is translated like any other.
Shapes: `B` rows, `T` logical length of this forward, `N` visual tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.decode_selector import Candidates, DecodeSelector
from foveate.engine.cache import PrunedLayer
from foveate.engine.cache_argument import cache_of
from foveate.engine.caches import pruned_layer
from foveate.engine.extensions.base import Extension
from foveate.engine.masks import left_align
from foveate.engine.plan import Plan

CANDIDATES = "candidates"  # what decoding steps choose from, attached to the layer where they do


class DecodeSelection(Extension):
    """The decoding step of a method, in one forward."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        planned = plan.decode_step
        assert planned is not None
        self.layer = planned.step.layer
        self.method = cast(DecodeSelector, planned.method)  # as the plan has checked
        self._unseen: Tensor | None = None  # (B, past + 1) logical positions
        self._masks: dict[int, tuple[Any, Tensor]] = {}  # id of a mask -> it, what it becomes

    def enter(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments of a layer, in logical terms, with the mask of what it is to see.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
        """
        cache = cache_of(kwargs)
        if cache is None:
            return kwargs
        if self.forward.groups:
            if number == self.layer:
                self._note_candidates(cache)
            return kwargs
        if self.forward.prompt.length == 1 and number == self.layer - 1:
            self._choose(number, layer, hidden, kwargs)
        keyless = number in self.forward.family.keyless_layers
        if self._unseen is None or number < self.layer or keyless:
            return kwargs
        return {**kwargs, "attention_mask": self._narrowed(kwargs.get("attention_mask"))}

    def _note_candidates(self, cache: Any) -> None:
        """Note in the cache which visual tokens of this forward survive."""
        forward, prompt = self.forward, self.forward.prompt
        surviving = torch.zeros(prompt.batch, prompt.length, dtype=torch.bool, device=prompt.device)
        yes, counts = torch.ones((), dtype=torch.bool, device=prompt.device), [0] * prompt.batch
        for group in forward.groups:
            if self.method.selects_from(group.shape.frames):
                surviving[forward.row_index(group), group.columns] = yes
                for image in group.images:
                    counts[image.row] += group.count
        if not any(counts):
            return
        columns, real = left_align(surviving, counts)
        columns = (columns + prompt.past).masked_fill(~real, -1)
        removed = prompt.length - forward.layout.index.shape[1]
        held = pruned_layer(cache, self.layer, forward.arguments.fresh, removed)
        candidates: Candidates | None = held.attached.get(CANDIDATES)
        held.attach(
            CANDIDATES, Candidates(columns) if candidates is None else candidates.join(columns)
        )

    def _choose(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Let the method choose by what this layer is about to attend to."""
        forward, cache = self.forward, cache_of(kwargs)
        held = cache.layers[self.layer] if len(cache.layers) > self.layer else None
        if not isinstance(held, PrunedLayer) or CANDIDATES not in held.attached:
            return
        candidates: Candidates = held.attached[CANDIDATES]
        columns = candidates.columns
        real = columns >= 0
        token = torch.zeros_like(columns[:, :1])
        signals = forward.decoder_signals
        attended = signals.attended(layer, hidden)
        view, past = signals.view(number, layer, attended, kwargs)
        visible = signals.columns.visible_past(token, past)
        attention = view.attention_to_past(token, visible)[:, :, 0]
        slots = past.index.contiguous()
        at = torch.searchsorted(slots, columns).clamp(max=slots.shape[1] - 1)
        attention = attention.gather(2, at[:, None].expand(-1, attention.shape[1], -1))
        there = slots.gather(1, at) == columns  # not so where a window has dropped them
        attention = attention.masked_fill(~(real & there)[:, None], 0.0)
        choice = self.method.choose(attention, real, candidates.choice)
        held.attach(CANDIDATES, replace(candidates, choice=choice))
        unseen = torch.zeros(
            len(columns), forward.prompt.past + 1, dtype=torch.bool, device=columns.device
        )
        # Padding goes to the new token's own column, which is set right after.
        unseen.scatter_(1, columns.masked_fill(~real, forward.prompt.past), real & ~choice.seen)
        unseen[:, -1] = False
        self._unseen = unseen

    def _narrowed(self, mask: Tensor | None) -> Tensor:
        """A mask without what is not to be seen; one for each mask that layers share."""
        assert self._unseen is not None
        key = id(mask)
        if key not in self._masks:
            self._masks[key] = mask, _without(mask, self._unseen, two_d=self.forward.prompt.flash)
        return self._masks[key][1]


def _without(mask: Tensor | None, unseen: Tensor, *, two_d: bool) -> Tensor:
    """A mask of one query without some keys.

    Args:
        mask: (B, K) for flash kernels or (B or 1, H or 1, 1, K), boolean or additive; `None` sees
            all. Masks of sliding windows begin later than at position 0, those of static caches
            end later than the sequence.
        unseen: (B, S) keys, S being the logical length.
        two_d: whether the kernel takes 2-D masks.
    """
    if mask is None:
        return (~unseen).long() if two_d else ~unseen[:, None, None]
    keys, length = mask.shape[-1], unseen.shape[1]
    unseen = unseen[:, length - keys :] if keys < length else F.pad(unseen, (0, keys - length))
    if mask.dim() == 2:
        return mask * (~unseen).to(mask.dtype)
    refuse = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(unseen[:, None, None], refuse)
