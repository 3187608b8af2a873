"""Positions of a stream's tokens: where the next ones stand, and how keys move."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.families import Family
from foveate.families.decoder_layer import mixer_of
from foveate.signals.layer_view import rotary_function

Positions = Literal["original", "renumbered"]
TYPES = "mm_token_type_ids"


def most_positions(config: Any) -> int | None:
    """How many positions a text model was made for; `None` if its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def chunk_positions(family: Family, ids: Tensor, first: int, inputs: Mapping[str, Any]) -> Tensor:
    """Positions of new tokens, as the model makes them for these alone, moved behind the last.

    Args:
        family: the model.
        ids: (1, n) token ids.
        first: the position after the last one.
        inputs: further arguments of the model.

    Returns:
        (1, n + 1), or (3, 1, n + 1) where positions are in time, height and width; the last is that
        of text that follows.

    Raises:
        InputError: what they are made from is missing.
    """
    if family.one_dimensional:
        return torch.arange(first, first + ids.shape[1] + 1, device=ids.device)[None]
    make = family.base.get_rope_index
    names = inspect.signature(make).parameters
    known = {name: value for name, value in inputs.items() if name in names}
    if known.get(TYPES) is None:
        raise InputError(
            f"{family.model_type} places frames by {TYPES}, which its processor makes and which "
            "are missing here"
        )
    known[TYPES] = F.pad(known[TYPES], (0, 1))
    text = max(family.placeholder_ids.values()) + 1  # no placeholder; nothing is looked up
    return make(F.pad(ids, (0, 1), value=text), **known)[0] + first


def turner(family: Family) -> Callable[[int, Tensor, Tensor], Tensor]:
    """What moves cached keys: of a layer's number, (H, S, d) keys and (H, S) changes of their
    positions, the keys at the new positions. A rotation by the difference does that.
    """

    def turn(number: int, keys: Tensor, change: Tensor) -> Tensor:
        if not family.rotates(number):
            return keys
        rotate, states = rotary_function(mixer_of(family.layers[number])), keys[:, None].float()
        cos, sin = family.rotary(states, change.long(), number)
        scale = (cos**2 + sin**2).sqrt()  # that of YaRN is in the keys already
        return rotate(states, states, cos / scale, sin / scale)[1][:, 0].to(keys)

    return turn
