"""What a layer is about to attend with whose attention has one matrix for queries, keys and values,
as in ModernBERT and Phi-4 Multimodal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.families.block import split
from foveate.signals.layer_view import LayerView

FUSED = ("Wqkv", "qkv_proj")
_PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def is_fused(attention: Any) -> bool:
    """Whether one matrix of an attention makes queries, keys and values, one after another."""
    return any(hasattr(attention, name) for name in FUSED)


class FusedView(LayerView):
    """A layer whose attention has one projection, of queries before keys before values."""

    @property
    def scaling(self) -> float:
        """What products of queries and keys are multiplied by: one over the root of their width."""
        return self.attention_module.head_dim**-0.5

    @cached_property
    @torch.no_grad()
    def _made(self) -> tuple[Tensor, ...]:
        """Queries, keys and values of all columns."""
        return self._parts(self._normed)

    def _parts(self, states: Tensor) -> tuple[Tensor, ...]:
        name = next(name for name in FUSED if hasattr(self.attention_module, name))
        made = super()._projection(name)(states)
        groups = getattr(self.attention_module, "num_key_value_groups", 1)
        heads = made.shape[-1] // self.attention_module.head_dim * groups // (groups + 2)
        return split(made, heads, groups)

    def _projection(self, name: str) -> Callable[[Tensor], Tensor]:
        part = _PARTS[name]
        return lambda states: (self._made if states is self._normed else self._parts(states))[part]
