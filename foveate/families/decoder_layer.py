"""The modules of a text model and the arguments of its layers, under the names that transformers'
models give them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from foveate.errors import UnsupportedModelError

NORMS = ("input_layernorm", "attention_layernorm", "operator_norm", "attn_norm", "norm")
MIXERS = ("self_attn", "attn", "linear_attn", "conv", "mixer")
MLPS = ("mlp", "feed_forward")
LAST_NORMS = ("norm", "embedding_norm", "final_norm", "norm_f")
HEAD_NORMS = {  # of queries, keys and values, before queries and keys are rotated
    "q": ("q_norm", "q_layernorm", "qk_norm"),
    "k": ("k_norm", "k_layernorm", "qk_norm"),
    "v": ("v_norm", "v_layernorm"),
}
LATE_HEAD_NORMS = {"q": ("query_layernorm", "qk_norm"), "k": ("key_layernorm", "qk_norm")}


def norm_of(layer: Any) -> Any:
    """The norm before what mixes tokens."""
    return _first(layer, NORMS)


def mixer_of(layer: Any) -> Any:
    """What mixes tokens: attention, or a recurrent module."""
    return _first(layer, MIXERS)


def is_causal(layer: Any) -> bool:
    """Whether the attention kernel of a layer, given no mask, lets a token see those before it
    alone.
    """
    return getattr(_find(layer, MIXERS), "is_causal", True)


def mlp_of(layer: Any) -> Any:
    """The MLP, or the mixture of experts."""
    return _first(layer, MLPS)


def has_mlp(layer: Any) -> bool:
    """Whether there is one beside what mixes tokens."""
    return _find(layer, MLPS) is not None


def named_arguments(kind: type, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of a layer, after its input, by name.

    Args:
        kind: the layer's class.
        args: the arguments.

    Raises:
        UnsupportedModelError: the layer has no names for so many.
    """
    names = _parameters(kind)
    if len(args) > len(names):
        raise UnsupportedModelError(
            f"{kind.__name__} was called with {len(args)} positional arguments after its input, "
            f"but names only {', '.join(names) or 'none'}: the installed transformers calls its "
            "decoder layers in a way this version of foveate does not know"
        )
    return dict(zip(names, args, strict=False))


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    parameters = tuple(inspect.signature(kind.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def heads_of(attention: Any) -> int:
    """Query heads of an attention with separate projections, of which some may have been pruned."""
    return attention.q_proj.out_features // attention.head_dim


def last_norm_of(text: Any) -> Any:
    """The norm of a text model after its last decoder layer."""
    return _first(text, LAST_NORMS)


def head_norm_of(attention: Any, part: str) -> Any:
    """The norm of an attention's queries (`q`), keys (`k`) or values (`v`); `None` without one."""
    return None if _norms_late(attention) else _find(attention, HEAD_NORMS[part])


def late_head_norm_of(attention: Any, part: str) -> Any:
    """The norm of queries or keys once they are rotated, as in HunyuanVL and Llama 4; `None`
    without one.
    """
    return _find(attention, LATE_HEAD_NORMS[part]) if _norms_late(attention) else None


def _norms_late(attention: Any) -> bool:
    """Whether heads are normed after they are rotated: a norm shared by queries and keys is late
    in Llama 4, whose attention says whether it rotates, and early in Muse.
    """
    return hasattr(attention, "query_layernorm") or hasattr(attention, "use_rope")


def position_scale_of(attention: Any) -> Callable[..., Tensor] | None:
    """What makes scales of queries from their position ids, as in Ministral 3; `None` elsewhere."""
    return getattr(sys.modules[type(attention).__module__], "get_llama_4_attn_scale", None)


def _first(module: Any, names: tuple[str, ...]) -> Any:
    found = _find(module, names)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has none of {', '.join(names)}: the installed transformers "
            "lays out its modules in a way this version of foveate does not know"
        )
    return found


def _find(module: Any, names: tuple[str, ...]) -> Any:
    found = (child for name in names if (child := getattr(module, name, None)) is not None)
    return next(found, None)
