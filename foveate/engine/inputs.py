"""Inputs: what the caller's arguments say of a forward, and which of them are refused.

Shapes: `B` rows, `T` logical length.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.core.transfer import Downloads, download
from foveate.engine.cache_argument import CACHE, cache_of
from foveate.engine.masks import real_positions
from foveate.engine.prompt import PromptTokens
from foveate.errors import InputError
from foveate.families import Family
from foveate.families.family import AUDIO

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> the argument that its pixels come in."""

LATER_IMAGES = (
    "after a cached prompt, {model} places a new image only if `generate` is given the features of "
    "the new image, and ids, mm_token_type_ids and grids of the whole conversation, but {but}; "
    "encode the new one within the session, new = model.get_image_features(pixel_values, "
    "image_grid_thw=its_grid), and call model.generate(input_ids=all_ids, attention_mask=..., "
    "mm_token_type_ids=all_types, image_grid_thw=all_grids, mm_encoder_outputs={{'image': new}}, "
    f"{CACHE}=cache); likewise with videos"
)
AS_TEXT = (
    "after a cache, {model} gives the tokens of a new image positions of text; run the whole "
    "conversation anew, without the cache"
)


def bound(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by name; those left at their defaults are missing."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def of_shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that features are made from, floating-point tensors without their data: what
    counting FLOPs needs.
    """
    outputs = {"return_dict"} | {name for name in arguments if name.startswith("output_")}
    return {
        name: _shape(value)
        for name, value in arguments.items()
        if name not in outputs and isinstance(value, Tensor | int | float | str | list | tuple)
    }


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.empty_like(value, device="meta")
    return value


def tells(ids: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """What says which tokens a prompt has: its ids and its mask, where they are 2-D."""
    told = (ids, arguments.get("attention_mask"))
    return [x for x in told if isinstance(x, Tensor) and x.dim() == 2]


def placeholders(
    family: Family,
    ids: Tensor | None,
    kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
    read: Downloads,
) -> dict[str, Tensor]:
    """The placeholders of visual tokens in a forward, on the host.

    Args:
        family: the model.
        ids: (B, T) token ids, or `None` where embeddings are given.
        kwargs: arguments of the base model.
        given: modality -> features that were encoded before.
        read: copies on the host.

    Returns:
        Modality -> (B, T) mask, for modalities that have some. A decoding step has none.

    Raises:
        InputError: there are embeddings only, which do not show where visual tokens are.
    """
    if ids is None:
        masks = _embedded_placeholders(family, kwargs, given)
    elif ids.shape[1] == 1 and not given:
        return {}
    else:
        ids = read.of(ids)
        masks = {modality: ids == token for modality, token in family.placeholder_ids.items()}
    return {modality: mask for modality, mask in masks.items() if bool(mask.any())}


def _embedded_placeholders(
    family: Family, kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The placeholders of a forward that is given embeddings: those that equal a placeholder's."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None or embeds.shape[1] == 1:
        return {}
    if not given and all(kwargs.get(name) is None for name in PIXELS.values()):
        instead = "pixel_values, or with mm_encoder_outputs for features you have already"
        if family.placer("image") is not None:
            instead = "the pixels"
        raise InputError(
            "inputs_embeds without input_ids do not say which rows are visual tokens; "
            f"pass input_ids with {instead}"
        )
    table, tokens = family.base.get_input_embeddings(), family.placeholder_ids
    each = [table(torch.full((), token, device=embeds.device)) for token in tokens.values()]
    masks = download([(embeds == placeholder).all(-1) for placeholder in each])
    return dict(zip(tokens, masks, strict=True))


def prompt_tokens(
    visual: Mapping[str, Tensor], arguments: Mapping[str, Any], read: Downloads
) -> tuple[PromptTokens, Tensor | None]:
    """What each token of a forward, or of a call of `generate`, is, on the host.

    Args:
        visual: modality -> (B, T) placeholders.
        arguments: those of the base model, or of `generate`.
        read: copies on the host.

    Returns:
        That, and (B, past + T) real positions, cached ones included; `None` for all.
    """
    everything = functools.reduce(torch.logical_or, visual.values())
    length = everything.shape[1]
    total = length + cached(cache_of(arguments))
    real = real_positions(arguments.get("attention_mask"), total, read)
    return PromptTokens(everything, None if real is None else real[:, -length:]), real


def cached(cache: Any) -> int:
    """Logical length of a cache; 0 without one."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def prompt_of(inputs: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The prompt of a call of `generate`: the (B, T) ids that are not cached yet, `None` if it is
    given none; and its arguments.
    """
    given = [x for x in (inputs, kwargs.get("input_ids")) if isinstance(x, Tensor)]
    ids = next((x for x in given if x.dim() == 2 and not x.is_floating_point()), None)
    past = cached(cache_of(kwargs))
    if ids is not None and ids.shape[1] > past:
        ids = ids[:, past:]
    return ids, dict(kwargs)


def check_drafts(sees: Tensor | None, trailing: int) -> None:
    """Refuse drafted tokens that the prompt attends to.

    Args:
        sees: (B or 1, T, T) as in `seen_positions`.
        trailing: drafted tokens at the end.

    Raises:
        InputError: the prompt sees them, so the answer would depend on the assistant.
    """
    if sees is not None and trailing and bool(sees[:, :-trailing, -trailing:].any()):
        raise InputError(
            "assisted decoding puts the assistant's drafts after the prompt, and this model's "
            "prompt attends to all of its input, drafts included, so the assistant would change "
            "the answer; generate without assistant_model and prompt_lookup_num_tokens"
        )


def check_length(family: Family, total: int) -> None:
    """Refuse prompts with images in which a token's place among survivors would count.

    Args:
        family: the model.
        total: tokens of the prompt, cached ones included.

    Raises:
        InputError: layers sharpen attention by places, and the prompt is so long that they do.
    """
    first = family.tempered_from
    if first is not None and total > first:
        raise InputError(
            f"layers of {family.model_type} sharpen their attention from position {first} on by "
            "where a token stands among those that they are given, which is not its position once "
            f"visual tokens are removed, and this prompt has {total} tokens; shorten it to {first} "
            "with those that are cached, or run it without a session"
        )


def check_early_exit(family: Family, arguments: Mapping[str, Any]) -> None:
    """Refuse a model as its own assistant, by an early exit, where transformers cannot do that.

    Args:
        family: the model.
        arguments: those of `generate`.

    Raises:
        InputError: transformers sets the number of layers on a config that has none.
    """
    given = arguments.get("generation_config") or getattr(family.model, "generation_config", None)
    layers = arguments.get("assistant_early_exit", getattr(given, "assistant_early_exit", None))
    config = family.base.config
    if layers is not None and not hasattr(config, "num_hidden_layers"):
        raise InputError(
            "assistant_early_exit does not work with this model: transformers sets the number of "
            f"layers on its {type(config).__name__}, which has none; use "
            "prompt_lookup_num_tokens, or another model as assistant_model"
        )


def check_later_images(family: Family, ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of `generate` that would give new images after a cache wrong positions.

    Positions in time, height and width are made from the grids of all images of the conversation,
    but the encoder needs the grids of the new pixels alone.

    Args:
        family: the model.
        ids: (B, T) token ids of the conversation, if `generate` is given any.
        kwargs: arguments of `generate`.

    Raises:
        InputError: the images cannot be placed; the message says how to pass them.
    """
    past = cached(cache_of(kwargs))
    if family.one_dimensional or not past or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    tokens = torch.tensor(list(_in_space(family).values()), device=ids.device)
    if not bool(torch.isin(ids[:, past:], tokens).any()):
        return
    if not family.places_later_images:
        raise InputError(AS_TEXT.format(model=family.model_type))
    if Version(transformers.__version__) < Version("5.23"):
        raise InputError(
            f"new images of {family.model_type} after a cached prompt have not been tested with "
            f"transformers {transformers.__version__}; use 5.23 or newer, or run the whole "
            "conversation again without a cache"
        )
    but = _why_misplaced(family, ids, past, kwargs)
    if but is not None:
        raise InputError(LATER_IMAGES.format(model=family.model_type, but=but))


def _in_space(family: Family) -> dict[str, int]:
    """Placeholders of what has positions in space: not of audio, whose are those of text."""
    return {name: token for name, token in family.placeholder_ids.items() if name != AUDIO}


def _why_misplaced(family: Family, ids: Tensor, past: int, kwargs: Mapping[str, Any]) -> str | None:
    """Why new images after a cache would get wrong positions; `None` if they would not.

    Args:
        family: the model.
        ids: (B, T) token ids of the conversation.
        past: how many of them the cache holds.
        kwargs: arguments of `generate`.
    """
    if kwargs.get("mm_token_type_ids") is None:
        return "mm_token_type_ids are missing"
    tokens = _in_space(family)
    grids = [kwargs[name] for m in tokens if kwargs.get(name := f"{m}_grid_thw") is not None]
    merge = family.config.vision_config.spatial_merge_size
    in_grids = sum(int(grid.prod(1).sum()) for grid in grids) // merge**2
    in_ids = int(torch.isin(ids, torch.tensor(list(tokens.values()), device=ids.device)).sum())
    if in_grids != in_ids:
        return f"the grids say {in_grids} visual tokens where the ids have {in_ids}"
    for modality, pixels in PIXELS.items():
        before = modality in tokens and bool((ids[:, :past] == tokens[modality]).any())
        if before and kwargs.get(pixels) is not None:
            return f"it was given {pixels}"
    return None


def check_positions(family: Family, kwargs: Mapping[str, Any]) -> None:
    """Refuse a forward that would give new images after a cache the positions of text.

    Args:
        family: the model.
        kwargs: arguments of the base model, in a forward with new images.

    Raises:
        InputError: there are a cache and no position ids, on a model whose positions are in time,
            height and width.
    """
    past = cached(cache_of(kwargs))
    if past and not family.one_dimensional and kwargs.get("position_ids") is None:
        but = "the model was called directly, without position_ids"
        why = LATER_IMAGES if family.places_later_images else AS_TEXT
        raise InputError(why.format(model=family.model_type, but=but))
