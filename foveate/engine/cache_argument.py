"""The argument by which models are given their cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
"""Its name in the installed transformers: `cache` from 5.24 on."""
NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))
"""Names that are taken; later versions know the old one, too."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or of one of its layers; `None` without one."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
