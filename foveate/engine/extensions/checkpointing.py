"""Replays: hooks of a decoder layer that run again when a checkpoint recomputes the layer.

Checkpointing of transformers recomputes a layer's forward and leaves its hooks outside. Wrappers
around a layer (FSDP's activation checkpointing) run hooks again in the backward pass, when the
forward is over; what they need to do the same again is kept as long as the checkpoint is.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from foveate.errors import UnsupportedModelError

if TYPE_CHECKING:
    from foveate.engine.forward import ForwardPass


class Replays:
    """States of forwards before layers that may be recomputed.

    A forward is known by its rotary embedding, or else by its position ids, which its layers are
    handed again.
    """

    def __init__(self) -> None:
        self._states = WeakIdKeyDictionary()  # name -> decoder layer -> the forward before it

    @torch.compiler.disable
    def keep(self, number: int, forward: ForwardPass, kwargs: dict[str, Any]) -> None:
        """Keep a forward over images as it is before a layer, if gradients are going to be asked
        for.

        Args:
            number: the decoder layer.
            forward: the forward.
            kwargs: what the layer is called with.
        """
        if forward.groups and torch.is_grad_enabled():
            self._states.setdefault(_name(kwargs), {})[number] = _copy(forward)

    @torch.compiler.disable
    def find(self, number: int, kwargs: dict[str, Any]) -> ForwardPass | None:
        """The forward before a layer that is recomputed, if it is.

        Args:
            number: the decoder layer.
            kwargs: what the layer is called with.
        """
        kept = self._states.get(_name(kwargs), {}).get(number)
        return None if kept is None else _copy(kept)

    @property
    def any(self) -> bool:
        """Whether any forward may be recomputed."""
        return bool(self._states.data)  # cheaper than its length: this is asked in every layer

    def __len__(self) -> int:
        """Forwards that may be recomputed."""
        return len(self._states)


def _name(kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer's forward is known by: some layers have no rotary positions.

    Raises:
        UnsupportedModelError: the layer is handed no tensor at all beside its input.
    """
    rotary = kwargs.get("position_embeddings")
    part = rotary if rotary is None or isinstance(rotary, Tensor) else rotary[0]
    known = (part, kwargs.get("position_ids"))
    found = next((x for x in (*known, kwargs.get("attention_mask")) if x is not None), None)
    if found is None:
        raise UnsupportedModelError(
            "a decoder layer without rotary positions and without a mask cannot be told apart when "
            "a wrapper checkpoints it; use the model's own gradient checkpointing, or train "
            "without it"
        )
    return found


def _copy(forward: ForwardPass) -> ForwardPass:
    """The same state, apart: what happens to one does not happen to the other."""
    twin = _twin(forward)
    twin.arguments = _twin(forward.arguments)
    twin.arguments.remembers = False
    twin.arguments.forget()
    twin.decoder_signals = forward.decoder_signals.on(twin)
    twin.extensions = [_twin(extension) for extension in forward.extensions]
    for extension in twin.extensions:
        extension.forward = twin
    return twin


def _twin(value: Any) -> Any:
    twin = copy.copy(value)
    for name, field in vars(value).items():
        if isinstance(field, dict | list):
            setattr(twin, name, copy.copy(field))
    return twin
