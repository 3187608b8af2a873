"""Layers that gradient checkpointing runs again in the backward pass.

Hooks of a layer stay outside of a checkpoint, but what acts within the layer acts again, when the
pass through the encoder is over. It must see the layer as it was in the pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from foveate.engine.attachment import Attachment
from foveate.engine.compilation import untraced
from foveate.engine.replaced_forward import Life
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.running_layer import RunningLayer
from foveate.errors import AttachError

CHECKPOINT = "_gradient_checkpointing_func"  # what a layer of transformers is checkpointed with


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer's forward runs again in the backward pass."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def leaves_hooks_outside() -> bool:
    """Whether hooks of a layer stay outside of its checkpoint, as from transformers 5.23 on."""
    return "__call__" not in vars(GradientCheckpointingLayer)


def follow(on: Attachment, life: Life, state: ThreadState, layer: nn.Module) -> None:
    """See to it that what acts within a layer that is checkpointed acts as it did when run again.

    Args:
        on: the attachment.
        life: whether it still acts.
        state: what each thread is doing with the model.
        layer: the layer.
    """
    checkpoint = getattr(layer, CHECKPOINT)
    if not (isinstance(checkpoint, _Followed) and checkpoint.life is life):
        on.put(layer, CHECKPOINT, _Followed(checkpoint, state, life))


@dataclass(frozen=True, eq=False)
class _Followed:
    """What a layer is checkpointed with.

    Args:
        checkpoint: what it would be checkpointed with.
        state: what each thread is doing with the model.
        life: whether the attachment still acts.
    """

    checkpoint: Callable[..., Any]
    state: ThreadState
    life: Life

    @untraced
    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.state.encoding is not None:
            forward = functools.partial(self._run, self.state.encoding.layer.kept(), forward)
        return self.checkpoint(forward, *args)

    @untraced
    def _run(self, layer: RunningLayer, forward: Callable[..., Any], *args: Any) -> Any:
        if not self.life.on:
            raise AttachError(
                "the backward pass of a forward with gradient checkpointing began after its "
                "session had ended, and would run layers again without what the session does "
                "within them; call `backward()` within the session"
            )
        before, self.state.recomputed = self.state.recomputed, layer
        try:
            return forward(*args)
        finally:
            self.state.recomputed = before
