"""LongRoPE: a sequence that grows beyond a length is rotated with other frequencies, all of it.

Keys that are cached by then have been rotated with the earlier ones, so what would mix both is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.engine.cache_argument import cache_of
from foveate.engine.inputs import cached
from foveate.errors import InputError
from foveate.families import Family
from foveate.families.text_facts import TextFacts


def check_switch(family: TextFacts, positions: Tensor, past: int) -> None:
    """Refuse tokens that are rotated with other frequencies than the keys that are cached.

    Args:
        family: the model.
        positions: (B, T) positions of new tokens, renumbered as those of the cached keys are.
        past: tokens that were cached, removed ones included.

    Raises:
        InputError: the sequence has grown to where LongRoPE takes others.
    """
    first = family.rope_switch
    if first is None or not past or past + positions.shape[-1] <= first:
        return
    if int(positions[..., 0].max()) <= first <= int(positions.max()):
        raise InputError(
            f"this {family.model_type} takes other rotary frequencies for sequences of more than "
            f"{first} tokens, and the tokens that are left have grown to more, but the cached keys "
            "are those of a shorter sequence; run the whole conversation anew without the cache, "
            "or use positions='original'"
        )


def check_cache_kept(family: Family, arguments: Mapping[str, Any]) -> None:
    """Refuse a step of `generate` for which transformers has dropped the cache.

    Args:
        family: the model.
        arguments: those of the base model.

    Raises:
        InputError: the step would see its own tokens alone.
    """
    positions = arguments.get("position_ids")
    if family.rope_switch is None or positions is None or cached(cache_of(arguments)):
        return
    if int(positions.min()) > 0:
        raise InputError(
            f"this {family.model_type} takes other rotary frequencies for sequences of more than "
            f"{family.rope_switch} tokens, and where a sequence grows to more, transformers drops "
            "its cache and goes on without the prompt; keep the prompt with its answer to so many, "
            "by max_new_tokens, or run a prompt of more anew"
        )
