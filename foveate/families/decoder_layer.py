"""The modules of a text model and the arguments of its layers, under the names that transformers'
models give them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from foveate.errors import UnsupportedModelError

NORMS = ("input_layernorm", "operator_norm", "attn_norm")
MIXERS = ("self_attn", "attn", "linear_attn", "conv")
ATTENTIONS = ("self_attn", "attn")
MLPS = ("mlp", "feed_forward")
LAST_NORMS = ("norm", "embedding_norm", "final_norm")
HEAD_NORMS = ("{}_norm", "{}_layernorm")


def norm_of(layer: Any) -> Any:
    """The norm before what mixes tokens."""
    return _first(layer, NORMS)


def mixer_of(layer: Any) -> Any:
    """What mixes tokens: attention, or a recurrent module."""
    return _first(layer, MIXERS)


def attends(layer: Any) -> bool:
    """Whether what mixes tokens is attention."""
    return _find(layer, ATTENTIONS) is not None


def is_causal(layer: Any) -> bool:
    """Whether the attention kernel of a layer, given no mask, lets a token see those before it
    alone.
    """
    return getattr(_find(layer, MIXERS), "is_causal", True)


def mlp_of(layer: Any) -> Any:
    """The MLP, or the mixture of experts."""
    return _first(layer, MLPS)


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


def last_norm_of(text: Any) -> Any:
    """The norm of a text model after its last decoder layer."""
    return _first(text, LAST_NORMS)


def head_norm_of(attention: Any, part: str) -> Any:
    """The norm of an attention's queries (`q`), keys (`k`) or values (`v`); `None` without one."""
    return _find(attention, tuple(name.format(part) for name in HEAD_NORMS))


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
