"""Attending: how the attention of an encoder layer is handed to a method.

transformers looks the kernel of an attention module up by a name in the module's config. A module
whose attention a method computes gets a config of its own while the session lasts, with a name that
leads here. So a method sees queries and keys as the kernel would, after norms and rotary positions,
whatever the model is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.attention import Kernel
from foveate.engine.attachment import Attachment

KERNEL = "foveate"  # a kernel's name, as configs have it
HOOK = "_foveate_attend"  # the attribute of an attention module that is called instead

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float, Kernel], Tensor | None]
Masked = Callable[[Tensor | None], Tensor | None]


def hand_over(
    on: Attachment, attention: Any, attend: Attend | None, masked: Masked | None = None
) -> None:
    """Let something else compute the attention of a module, till the attachment is removed.

    Args:
        on: the attachment.
        attention: the attention module.
        attend: is handed queries, keys, values, mask, scaling, dropout and kernel, as
            `LayerAttention` has them; returns (B, N, H, d), or `None` to let the module do as it
            does; `None` if nothing else computes it.
        masked: what the kernel is handed in place of a mask; `None` to hand it the module's.
    """
    AttentionInterface.register(KERNEL, _kernel)
    config = copy.copy(attention.config)
    config._attn_implementation_internal = KERNEL
    on.put(attention, HOOK, _Kernel(attention.config, attend, masked))
    on.put(attention, "config", config)


def takes_over(attention: nn.Module) -> bool:
    """Whether a module looks its kernel up, so that its attention can be handed over."""
    return hasattr(getattr(attention, "config", None), "_attn_implementation") and hasattr(
        sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS"
    )


@dataclass(frozen=True, eq=False)
class _Kernel:
    """What an attention module calls as its kernel.

    Args:
        config: the module's own config, which names the kernel that it would call.
        attend: see `hand_over`.
        masked: see `hand_over`.
    """

    config: Any
    attend: Attend | None
    masked: Masked | None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, given: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        def own(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Any]:
            name = self.config._attn_implementation
            kernel = _own(module, name)
            if name == "eager" and mask is not given:  # the module's need not look at masks
                kernel = _eager
            return kernel(module, query, key, value, mask, **kwargs)

        mask = given if self.masked is None else self.masked(given)
        mixed = None
        if self.attend is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            dropout = kwargs.get("dropout", 0.0)
            parts = query, key, value, mask, scaling, dropout
            mixed = self.attend(*parts, lambda *of: own(*of)[0])
        return own(query, key, value, mask) if mixed is None else (mixed, None)


def _kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    hook = vars(module)[HOOK]
    return hook(module, *args, **kwargs)


def _own(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel that a module would call without a method."""
    names = ["eager_attention_forward"]
    if not hasattr(module, "num_key_value_groups"):  # a file of text and images may have two
        names.insert(0, "simple_eager_attention_forward")
    of = sys.modules[type(module).__module__]
    eager: Any = next((getattr(of, name) for name in names if hasattr(of, name)), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that adds a mask to its scores: (B, N, H, d), and its map (B, H, N, N)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights
