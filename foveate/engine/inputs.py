"""What the arguments of a forward say: where visual tokens stand, and what is padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.errors import InputError
from foveate.families import Family

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> the argument that its pixels come in."""

LATER_IMAGES = (
    "behind a cache, {model} places a new image only if `generate` is given the features of the "
    "new image, and ids, mm_token_type_ids and grids of the whole conversation, but {but}; encode "
    "the new one within the session, new = model.get_image_features(pixel_values, "
    "image_grid_thw=its_grid), and call model.generate(input_ids=all_ids, attention_mask=..., "
    "mm_token_type_ids=all_types, image_grid_thw=all_grids, mm_encoder_outputs={{'image': new}}, "
    "past_key_values=cache); likewise with videos"
)


def bound(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, without defaults."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def of_shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What features are made from, to count work by: floating-point tensors without their data."""
    said = {"return_dict"} | {name for name in arguments if name.startswith("output_")}
    return {
        name: _shape(value)
        for name, value in arguments.items()
        if name not in said and isinstance(value, Tensor | int | float | str | list | tuple)
    }


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.empty_like(value, device="meta")
    return value


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
    if ids is None:
        masks = _embedded_placeholders(family, kwargs, given)
    elif ids.shape[1] == 1 and not given:
        return {}
    else:
        masks = {modality: ids == token for modality, token in family.placeholder_ids.items()}
    return {modality: mask for modality, mask in masks.items() if bool(mask.any())}


def _embedded_placeholders(
    family: Family, kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The same of embeddings: where they equal that of the placeholder."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None or embeds.shape[1] == 1:
        return {}
    if not given and all(kwargs.get(name) is None for name in PIXELS.values()):
        raise InputError(
            "inputs_embeds without input_ids do not say which rows are visual tokens; "
            "pass input_ids with pixel_values, or with mm_encoder_outputs for features "
            "you have already"
        )
    table, masks = family.base.get_input_embeddings(), {}
    for modality, token in family.placeholder_ids.items():
        placeholder = table(torch.tensor(token, device=embeds.device))
        masks[modality] = (embeds == placeholder).all(-1)
    return masks


def cached(cache: Any) -> int:
    """Logical length of what a cache holds; 0 of none."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def prompt_of(inputs: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """Ids of the prompt that `generate` is called with, without what a cache holds, if there are
    any, and its arguments.
    """
    given = [x for x in (inputs, kwargs.get("input_ids")) if isinstance(x, Tensor)]
    ids = next((x for x in given if x.dim() == 2 and not x.is_floating_point()), None)
    past = cached(kwargs.get("past_key_values"))
    if ids is not None and ids.shape[1] > past:
        ids = ids[:, past:]
    return ids, dict(kwargs)


def real_positions(mask: Any, total: int) -> Tensor | None:
    """(B, total) positions that are neither padding nor hidden, or `None` if all are real.

    Args:
        mask: what the text model was given: 2-D, 4-D, a dict of those by kind of layer, or `None`.
        total: logical length, cached positions included.
    """
    sees = _square(mask)
    if sees is not None:
        mask = sees[..., :total].any(1)
        mask[:, -sees.shape[1] :] &= ~_hidden(sees[..., total - sees.shape[1] : total])
    elif isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    real = mask[:, :total].bool()
    return None if bool(real.all()) else real


def from_first(positions: Tensor | None, real: Tensor | None, past: int) -> Tensor | None:
    """Positions counted from the first token of each row, where a model was given none and counts
    the padding before it too; `None` where they are so.

    Args:
        positions: (B or 1, T) positions of a forward; `None` where layers are told none.
        real: (B, past + T) positions of the sequence that are no padding; `None` for all.
        past: cached positions.
    """
    if positions is None or positions.dim() != 2 or real is None:
        return None
    column = real[:, past:].long().argmax(1, keepdim=True)
    positions = positions.expand(len(real), -1)
    counts_all = positions.gather(1, column) == column + past
    padding = torch.where(counts_all, real.long().argmax(1, keepdim=True), 0)
    return (positions - padding).clamp(min=0) if bool(padding.any()) else None


def numbered_positions(positions: Any, real: Tensor | None, length: int) -> Tensor | None:
    """(B, T) which positions make those after them go on by one; `None` if all do.

    What a caller hides in the middle takes a number of its own, or does not where positions are
    counts of what is not hidden, as in `generate`.

    Args:
        positions: (B or 1, T) position ids that the text model is given, if it is given plain ones.
        real: as `real_positions` finds it.
        length: T.
    """
    if real is None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    real = real[:, -length:]
    count = real.long().cumsum(1) - positions
    first = count.gather(1, real.to(torch.uint8).argmax(1, keepdim=True))
    counted = ((count == first) | ~real).all(1, keepdim=True)
    return real | ~counted


def seen_positions(mask: Any, past: int, length: int) -> Tensor | None:
    """(B or 1, T, T) which positions of a forward each of its positions sees, or `None` where it
    is those before it: masks that are built beforehand may hold blocks or prefixes.

    Args:
        mask: as in `real_positions`.
        past: cached positions.
        length: T.
    """
    sees = _square(mask)
    return None if sees is None else sees[:, :, past : past + length]


def _hidden(sees: Tensor) -> Tensor:
    """(B or 1, T) which positions only see themselves be seen, while the next one goes on where
    they are. So it is with tokens that a caller hides; a sample of several in a row ends so as
    well, but the next one begins anew.

    Args:
        sees: (B or 1, T, T) what each position sees.
    """
    itself = torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device)
    alone = ~(sees & ~itself).any(1)
    others = (sees & ~itself)[:, :-1]
    lost = others & ~sees[:, 1:]  # at most what a window leaves behind, the first that it saw
    first = others.to(torch.uint8).argmax(2, keepdim=True)
    lost = lost.scatter(2, first, False).any(2)
    alone[:, :-1] &= (others & sees[:, 1:]).any(2) & ~lost
    alone[:, -1:] = False
    return alone


def check_drafts(sees: Tensor | None, trailing: int) -> None:
    """Refuse drafts that the prompt before them sees.

    Args:
        sees: (B or 1, T, T) as in `seen_positions`.
        trailing: drafted tokens at the end.

    Raises:
        InputError: it does, so that answers would depend on the assistant.
    """
    if sees is not None and trailing and bool(sees[:, :-trailing, -trailing:].any()):
        raise InputError(
            "assisted decoding puts the assistant's drafts behind the prompt, and this model's "
            "prompt sees all of itself, the drafts too, so that the assistant would change the "
            "answer; generate without assistant_model and prompt_lookup_num_tokens"
        )


def check_early_exit(family: Family, arguments: Mapping[str, Any]) -> None:
    """Refuse to let a model assist itself by leaving early where transformers cannot.

    Args:
        family: the model.
        arguments: what `generate` is called with.

    Raises:
        InputError: transformers looks for the number of layers where the model does not have it.
    """
    given = arguments.get("generation_config") or getattr(family.model, "generation_config", None)
    layers = arguments.get("assistant_early_exit", getattr(given, "assistant_early_exit", None))
    config = family.base.config
    if layers is not None and not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"assistant_early_exit cannot make an assistant of this model: transformers sets the "
            f"number of layers on its {type(config).__name__}, which has none; use "
            "prompt_lookup_num_tokens, or another model as assistant_model"
        )


def _square(mask: Any) -> Tensor | None:
    """(B or 1, T, K) bool of a mask that says what each position sees."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None or mask.dim() != 4:
        return None
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def samples(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which sample of its row each position is of, where several are packed after one another.

    As in transformers, without a mask a sample begins wherever positions do not go on by one. The
    caller has to know whether the text model looks at that: with a cache, only flash kernels do.

    Args:
        kwargs: what the base model is called with.

    Returns:
        (B, T) numbers, or `None` where every row is one sample.

    Raises:
        InputError: samples are told apart by lengths that only kernels see.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        raise InputError(
            "cu_seq_lens_q tells the attention kernel where packed samples begin, in lengths that "
            "do not hold once tokens are removed; leave it out and pass position_ids that begin "
            "anew with each sample, without an attention mask"
        )
    position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position_ids is None or mask is not None:
        return None
    if position_ids.dim() == 3:  # on M-RoPE models, positions of text come first if they are given
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    jumps = position_ids.diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    return F.pad(jumps.cumsum(1), (1, 0))


def check_later_images(family: Family, ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse calls of `generate` that would place new images after a cache wrongly.

    Where positions are in time, height and width, they are made from the grids of all images of
    the conversation, while the encoder wants those of its pixels.

    Args:
        family: the model.
        ids: (B, T) token ids of the conversation, as far as they are given.
        kwargs: arguments of `generate`.

    Raises:
        InputError: the images cannot be placed; the message says how to pass them.
    """
    past = cached(kwargs.get("past_key_values"))
    if family.one_dimensional or not past or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    tokens = torch.tensor(list(family.placeholder_ids.values()), device=ids.device)
    if not bool(torch.isin(ids[:, past:], tokens).any()):
        return
    if Version(transformers.__version__) < Version("5.23"):
        raise InputError(
            f"a new image of {family.model_type} behind a cache was not seen to be placed rightly "
            f"with transformers {transformers.__version__}; use 5.23 or newer, or run the whole "
            "conversation anew"
        )
    but = _why_misplaced(family, ids, past, kwargs)
    if but is not None:
        raise InputError(LATER_IMAGES.format(model=family.model_type, but=but))


def _why_misplaced(family: Family, ids: Tensor, past: int, kwargs: Mapping[str, Any]) -> str | None:
    """Why new images after a cache would be placed wrongly; `None` if they would not.

    Args:
        family: the model.
        ids: (B, T) token ids of the conversation.
        past: how many of them the cache holds.
        kwargs: arguments of `generate`.
    """
    if kwargs.get("mm_token_type_ids") is None:
        return "mm_token_type_ids are missing"
    tokens = family.placeholder_ids
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
    """Refuse a forward whose new images would get positions of text.

    Args:
        family: the model.
        kwargs: arguments of the base model, which sees new images.

    Raises:
        InputError: there is a cache and no positions, where they are no plain numbers.
    """
    past = cached(kwargs.get("past_key_values"))
    if past and not family.one_dimensional and kwargs.get("position_ids") is None:
        but = "the model was called by itself, without position_ids"
        raise InputError(LATER_IMAGES.format(model=family.model_type, but=but))
