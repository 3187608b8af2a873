"""The modules and the arguments of a decoder layer, under the names that transformers' models give
them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from foveate.errors import UnsupportedModelError

NORMS = ("input_layernorm", "operator_norm")
MIXERS = ("self_attn", "linear_attn", "conv")
MLPS = ("mlp", "feed_forward")


def norm_of(layer: Any) -> Any:
    """The norm before what mixes tokens."""
    return _first(layer, NORMS)


def mixer_of(layer: Any) -> Any:
    """What mixes tokens: attention, or a recurrent module."""
    return _first(layer, MIXERS)


def mlp_of(layer: Any) -> Any:
    """The MLP, or the mixture of experts."""
    return _first(layer, MLPS)


def named_arguments(kind: type, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of a layer, after its input, by name.

    Args:
        kind: the layer's class.
        args: the arguments.
    """
    return dict(zip(_parameters(kind), args, strict=False))


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[2:]


def _first(layer: Any, names: tuple[str, ...]) -> Any:
    found = (module for name in names if (module := getattr(layer, name, None)) is not None)
    module = next(found, None)
    if module is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has none of {', '.join(names)}: the installed transformers "
            "lays out its decoder layers in a way this version of foveate does not know"
        )
    return module
