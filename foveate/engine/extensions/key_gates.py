"""KeyGates: in training, how much decoder layers attend to each visual token.

A gate g multiplies what a token weighs in every softmax: log g is added to its scores. At 1 nothing
changes, and towards 0 the token is gone, as if it had been removed.
Shapes: `B` rows, `T` logical length, `P` physical columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.engine.extensions.base import Extension, Kwargs
from foveate.engine.images import ImageGroup
from foveate.engine.slots import Slots
from foveate.errors import UnsupportedModelError


class KeyGates(Extension):
    """Gates of one forward; those of several steps multiply."""

    _log: Tensor | None = None  # (B, T) of each token
    _made: tuple[Any, Any, Tensor] | None = None  # mask, layout, and the mask with gates

    def gate(self, part: ImageGroup, gates: Tensor) -> None:
        """Note how much later layers attend to the tokens of a group."""
        prompt = self.forward.prompt
        if self._log is None:
            self._log = gates.new_zeros(prompt.batch, prompt.length)
        where = (self.forward.row_index(part), part.columns)
        added = gates.clamp(min=torch.finfo(gates.dtype).tiny).log()
        self._log = self._log.index_put(where, added, accumulate=True)
        self._made = None

    def runs(self, number: int) -> bool:
        """Whether there are gates."""
        return self._log is not None

    def attending(self, slots: Slots, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """The mask of a layer, with the gates of its keys.

        Raises:
            UnsupportedModelError: the kernel takes no such mask, or keys are not the columns.
        """
        if self._log is None:
            return kwargs
        layout, mask = self.forward.layout, kwargs.get("attention_mask")
        count = layout.index.shape[1]
        if self.forward.prompt.flash or (mask is not None and mask.dim() != 4):
            raise UnsupportedModelError(
                "a method that learns gates between decoder layers needs attention that takes "
                "masks of numbers; set the model's attention to 'sdpa' or 'eager'"
            )
        if slots.count != count or hidden.shape[1] != count:
            raise UnsupportedModelError(
                "a method that learns gates between decoder layers trains on whole prompts, whose "
                "layers have keys of their own; train without a cache of earlier turns"
            )
        if self._made is None or self._made[0] is not mask or self._made[1] is not layout:
            log = self._log.gather(1, layout.index.clamp(min=0)).to(hidden)[:, None, None]
            self._made = mask, layout, self._bias(mask, count, log) + log  # layers share it
        return {**kwargs, "attention_mask": self._made[2]}

    def _bias(self, mask: Tensor | None, count: int, like: Tensor) -> Tensor:
        """(B or 1, 1, P, P) what a mask adds to scores, as numbers."""
        if mask is not None and mask.dtype != torch.bool:
            return mask
        if mask is None:
            mask = torch.ones(count, count, dtype=torch.bool, device=like.device).tril()[None, None]
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(
            ~mask, torch.finfo(like.dtype).min
        )
