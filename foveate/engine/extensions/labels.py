"""Labels: what only training with labels needs of a forward.

Labels say where prompts end, and so which tokens rank the visual tokens. They come to the model
with its head, before any layer runs: hooks call these functions, and no forward makes an extension
for them.
Shapes: `B` rows, `T` logical length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.inputs import bound
from foveate.engine.prompt import PromptTokens
from foveate.errors import InputError

IGNORED = -100  # the label of what is not supervised


def is_training(model: nn.Module) -> bool:
    """Whether a forward of the base model is one of training."""
    return model.training and torch.is_grad_enabled()


def labels_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B, T) labels that a model with its head is called with; `None` if it is given none."""
    labels = kwargs.get("labels")
    if labels is None and len(args) > 1:
        labels = bound(model.forward, args, kwargs).get("labels")
    return labels


def check_labels(model: nn.Module, slugs: Sequence[str]) -> None:
    """Refuse training without labels where visual tokens are ranked by the prompt.

    Args:
        model: the base model.
        slugs: methods that rank by the prompt.

    Raises:
        InputError: the model trains, so that only labels could say where prompts end.
    """
    if is_training(model):
        raise InputError(
            f"{', '.join(slugs)} ranks visual tokens by what the prompt asks, and in training only "
            "labels say where prompts end; pass `labels` to the model (you may ignore the loss "
            "that it returns), call eval() if this is not training, or use a method that does not "
            "read the prompt"
        )


def supervise(tokens: PromptTokens, model: nn.Module, labelled: Tensor) -> PromptTokens:
    """The tokens of a prompt, of which some are supervised.

    Args:
        tokens: what each token is, without labels.
        model: the base model.
        labelled: (B, T) positions with a label.

    Raises:
        InputError: the model trains, and labels supervise a visual token or one after padding.
    """
    if not is_training(model):
        return replace(tokens, supervised=labelled & ~tokens.visual)
    if bool((labelled & tokens.visual).any()):
        raise InputError(
            "the labels supervise visual tokens, which no model should predict; set "
            "labels[input_ids == model.config.image_token_id] = -100, or supervise answers alone "
            "(with TRL, assistant_only_loss=True or prompt-completion data)"
        )
    present = tokens.present
    if present is not None and bool((labelled[:, 1:] & ~present[:, :-1]).any()):
        raise InputError(
            "the first token after left padding (or hidden text) is supervised, but only padding "
            "is there to predict it; set its label to -100, or pad on the right"
        )
    return replace(tokens, supervised=labelled)


def only_labelled(labels: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which a model makes logits only where there is a label, and the same loss.

    Args:
        labels: (B, T) of each token, -100 where there is none.
        kwargs: arguments of the model with its head.
    """
    chosen = kwargs.get("logits_to_keep", 0)
    fused = kwargs.get("fused_lm_head")  # TRL's, which makes no logits at all
    if fused or kwargs.get("shift_labels") is not None or not isinstance(chosen, int) or chosen:
        return dict(kwargs)  # the caller has chosen
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = following != IGNORED
    if not bool(kept.any()):
        return dict(kwargs)
    return {**kwargs, "logits_to_keep": kept, "shift_labels": following[kept]}
