"""What the arguments of a forward say: where visual tokens stand, and what is padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.engine.prompt import IGNORED
from foveate.errors import InputError
from foveate.families import Family

LATER_IMAGES = (
    "behind a cache, {model} places a new image only if `generate` is given the features of the "
    "new image, and ids, mm_token_type_ids and grids of the whole conversation, but {but}; encode "
    "the new one within the session, new = model.get_image_features(pixel_values, "
    "image_grid_thw=its_grid), and call model.generate(input_ids=all_ids, attention_mask=..., "
    "mm_token_type_ids=all_types, image_grid_thw=all_grids, mm_encoder_outputs={{'image': new}}, "
    "past_key_values=cache); likewise with videos"
)
AS_TEXT = (
    "behind a cache, {model} gives the tokens of a new image positions of text; run the whole "
    "conversation anew, without the cache"
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
    if ids is not None and ids.shape[1] == 1 and not given:
        return {}
    tokens = family.placeholder_ids
    if ids is not None:
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


def labels_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B, T) labels that a model is called with, if any."""
    labels = kwargs.get("labels")
    if labels is None and len(args) > 1:
        labels = bound(model.forward, args, kwargs).get("labels")
    return labels


def check_labels(model: nn.Module, slugs: Sequence[str]) -> None:
    """Refuse to rank by the prompt in training if nothing says where prompts end.

    Args:
        model: the base model.
        slugs: methods that rank by the prompt.

    Raises:
        InputError: the model trains, and was called without labels.
    """
    if model.training and torch.is_grad_enabled():
        raise InputError(
            f"{', '.join(slugs)} ranks visual tokens by what the prompt asks, and in training only "
            "labels say where prompts end; pass `labels` to the model (a loss of your own may "
            "ignore the one that it returns), call eval() if this is not training, or use a method "
            "that does not look at the prompt"
        )


def supervised_text(
    model: nn.Module, supervised: Tensor, visual: Tensor, real: Tensor | None
) -> Tensor:
    """(B, T) which text is supervised.

    Args:
        model: the base model.
        supervised: (B, T) positions with a label.
        visual: (B, T) placeholders.
        real: (B, T) positions that are no padding; `None` for all.

    Raises:
        InputError: the model trains, and labels stand where nothing predicts them once tokens are
            removed.
    """
    if not (model.training and torch.is_grad_enabled()):
        return supervised & ~visual
    if bool((supervised & visual).any()):
        raise InputError(
            "the labels supervise visual tokens, which no model is to predict; set "
            "labels[input_ids == model.config.image_token_id] = -100, or supervise answers alone "
            "(with TRL, assistant_only_loss=True or prompt-completion data)"
        )
    if real is not None and bool((supervised[:, 1:] & ~(real | visual)[:, :-1]).any()):
        raise InputError(
            "the first token behind left padding (or hidden text) is supervised, but only padding "
            "is there to predict it; set its label to -100, or pad on the right"
        )
    return supervised


def only_labelled(labels: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which a model makes logits only where there is a label, at the same loss.

    Args:
        labels: (B, T) of each token, -100 where there is none.
        kwargs: what the model is called with.
    """
    chosen = kwargs.get("logits_to_keep", 0)
    fused = kwargs.get("fused_lm_head")  # TRL's, which makes no logits at all
    if fused or kwargs.get("shift_labels") is not None or not isinstance(chosen, int) or chosen:
        return dict(kwargs)  # the caller has chosen
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = following != IGNORED
    if not bool(kept.any()):
        return dict(kwargs)
    return {**kwargs, "logits_to_keep": kept, "shift_labels": following[kept]}


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
    tokens = family.placeholder_ids
    seen = torch.isin(ids, torch.tensor(list(tokens.values()), device=ids.device))
    if not bool(seen[:, past:].any()):
        return
    if not family.places_later_images:
        raise InputError(AS_TEXT.format(model=family.model_type))
    if Version(transformers.__version__) < Version("5.23"):
        raise InputError(
            f"a new image of {family.model_type} behind a cache was not seen to be placed rightly "
            f"with transformers {transformers.__version__}; use 5.23 or newer, or run the whole "
            "conversation anew"
        )
    grids = [kwargs[name] for m in tokens if kwargs.get(name := f"{m}_grid_thw") is not None]
    merge = family.config.vision_config.spatial_merge_size
    said = sum(int(grid.prod(1).sum()) for grid in grids) // merge**2
    but = None
    if kwargs.get("mm_token_type_ids") is None:
        but = "mm_token_type_ids are missing"
    elif said != int(seen.sum()):
        but = f"the grids say {said} visual tokens where the ids have {int(seen.sum())}"
    for modality, suffix in (("image", ""), ("video", "_videos")):
        before = modality in tokens and bool((ids[:, :past] == tokens[modality]).any())
        if before and kwargs.get(f"pixel_values{suffix}") is not None:
            but = but or f"it was given pixel_values{suffix}"
    if but is not None:
        raise InputError(LATER_IMAGES.format(model=family.model_type, but=but))


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
        why = LATER_IMAGES if family.places_later_images else AS_TEXT
        raise InputError(why.format(model=family.model_type, but=but))
