"""Eviction: the caches of earlier layers forget what a step drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.engine.caches import pruned_layer
from foveate.engine.extensions.base import Extension
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.slots import Slots


class Eviction(Extension):
    """Lets cache layers before a step's layer keep only what survives the step."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        self._before = 0  # the last layer before which caches evicted anything

    def after_step(self, planned: PlannedStep, cache: Any) -> None:
        """Evict what the step has dropped."""
        if cache is None or "evict_cache" not in planned.step.effects:
            return
        self._before = planned.step.layer
        prompt = self.forward.prompt
        dropped = self._dropped()
        full = Slots.full(prompt.batch, prompt.past + prompt.length, prompt.device)
        kept: dict[Slots, tuple[Slots, Tensor]] = {}  # layers that share slots go on sharing
        for number in range(self._before):
            held = pruned_layer(cache, number, full, 0)
            assert held.slots is not None
            if held.slots not in kept:
                kept[held.slots] = held.slots.without(dropped)
            held.evict(*kept[held.slots])

    def _dropped(self) -> Tensor:
        """(B, past + T) logical positions without a column."""
        prompt, layout = self.forward.prompt, self.forward.layout
        dropped = torch.ones(
            prompt.batch, prompt.length + 1, dtype=torch.bool, device=prompt.device
        )
        dropped.scatter_(1, layout.index % (prompt.length + 1), False)  # padding: out of sight
        past = dropped.new_zeros(prompt.batch, prompt.past)
        if prompt.real is not None:
            past = ~prompt.real[:, : prompt.past]
        return torch.cat((past, dropped[:, :-1]), 1)

    def record(self) -> Mapping[str, Any]:
        """The layer before which caches evicted."""
        return {"evicted_before": self._before}
