"""What the arguments of a forward say: where visual tokens stand, and what is padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.models import Family


def bound(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, without defaults."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def placeholders(
    family: Family,
    ids: Tensor | None,
    kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Where visual tokens stand in a forward.

    Args:
        family: the model.
        ids: (B, T) token ids, or `None` where embeddings are given.
        kwargs: what the base model was called with.
        given: modality -> features that were encoded before.

    Returns:
        Modality -> (B, T) placeholders, for modalities that have some.

    Raises:
        InputError: embeddings alone, which do not say which rows are visual tokens.
    """
    tokens = family.placeholder_ids
    if ids is not None:
        if ids.shape[1] == 1 and not given:
            return {}
        masks = {modality: ids == token for modality, token in tokens.items()}
    else:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] == 1:
            return {}
        if not given and not any(
            kwargs.get(f"pixel_values{s}") is not None for s in ("", "_videos")
        ):
            raise InputError(
                "inputs_embeds without input_ids do not say which rows are visual tokens; "
                "pass input_ids with pixel_values, or with mm_encoder_outputs for features "
                "you have already"
            )
        table = family.base.get_input_embeddings()
        one = {m: table(torch.tensor(token, device=embeds.device)) for m, token in tokens.items()}
        masks = {modality: (embeds == row).all(-1) for modality, row in one.items()}
    return {modality: mask for modality, mask in masks.items() if bool(mask.any())}


def real_positions(mask: Any, total: int) -> Tensor | None:
    """(B, total) positions that are no padding, or `None` if all are real.

    Args:
        mask: what the text model was given: 2-D, 4-D, a dict of those by kind of layer, or `None`.
        total: logical length, cached positions included.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    if mask.dim() == 4:  # built beforehand, for static caches: the last query sees all that is real
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = mask[:, :total].bool()
    return None if bool(real.all()) else real
