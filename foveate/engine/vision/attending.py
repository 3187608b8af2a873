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
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.attention import Kernel
from foveate.engine.attachment import Attachment

KERNEL = "foveate"  # a kernel's name, as configs have it
HOOK = "_foveate_attend"  # the attribute of an attention module that is called instead

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, Kernel], Tensor | None]


def hand_over(on: Attachment, attention: Any, attend: Attend) -> None:
    """Let something else compute the attention of a module, till the attachment is removed.

    Args:
        on: the attachment.
        attention: the attention module.
        attend: is handed queries, keys, values, mask, scaling and kernel, as `LayerAttention` has
            them; returns (B, N, H, d), or `None` to let the module do as it does.
    """
    AttentionInterface.register(KERNEL, _kernel)
    before = attention.config

    def hook(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        own = _own(module, before._attn_implementation)

        def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return own(module, query, key, value, mask, **kwargs)[0]

        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mixed = attend(query, key, value, mask, scaling, kernel)
        return own(module, query, key, value, mask, **kwargs) if mixed is None else (mixed, None)

    config = copy.copy(before)
    config._attn_implementation_internal = KERNEL
    on.put(attention, HOOK, hook)
    on.put(attention, "config", config)


def takes_over(attention: nn.Module) -> bool:
    """Whether a module looks its kernel up, so that its attention can be handed over."""
    return hasattr(getattr(attention, "config", None), "_attn_implementation") and hasattr(
        sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS"
    )


def _kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    hook = vars(module)[HOOK]
    return hook(module, *args, **kwargs)


def _own(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel that a module would call without a method."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
