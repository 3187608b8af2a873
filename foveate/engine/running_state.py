"""A cache layer whose running state is replaced at each update, where transformers writes over it.

Whoever holds the state before a forward then has it as it was, without a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class ReplacedStateLayer(LinearAttentionLayer):
    """A layer of running states for models that hand each new state to the cache. Convolution
    states are written over as ever: models write into them directly.
    """

    _layer_type = None  # keeps the subclass out of transformers' table of layer types

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> ReplacedStateLayer:
        """A layer with the states of another, which stays as it is."""
        made = cls.__new__(cls)
        for name, value in vars(layer).items():
            vars(made)[name] = dict(value) if isinstance(value, dict) else value
        return made

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Put a new state in the place of the old one, of the same type and on its device."""
        if not self.is_recurrent_states_initialized[state_idx]:
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        state = recurrent_states.to(self.recurrent_states[state_idx])
        self.recurrent_states[state_idx] = state
        return state
