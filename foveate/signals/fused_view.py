"""What a layer of ModernBERT is about to attend with: one matrix makes queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveate.signals.layer_view import LayerView

FUSED = "Wqkv"
_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


class FusedView(LayerView):
    """A layer whose attention has one projection, of queries before keys before values."""

    @property
    def scaling(self) -> float:
        """What products of queries and keys are multiplied by: one over the root of their width."""
        return self.attention_module.head_dim**-0.5

    def _projection(self, name: str) -> Callable[[Tensor], Tensor]:
        made, third = super()._projection(FUSED), _THIRDS[name]
        return lambda states: made(states).chunk(3, dim=-1)[third]
