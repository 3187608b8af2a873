"""Losses: what methods that learn add to the loss of a model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError


def with_losses(
    output: Any, losses: Mapping[str, Tensor], supervised: Tensor | None, kwargs: Mapping[str, Any]
) -> Any:
    """A model's output, to whose loss methods have added theirs.

    A Trainer that accumulates gradients divides the model's loss by the labels of all its batches.
    So each batch adds its share of the methods' losses.

    Args:
        output: of the model with its head.
        losses: what methods add, scalars by name.
        supervised: (B, T) positions with a label; `None` without labels.
        kwargs: what the model was called with.

    Raises:
        InputError: the model was given no labels, or was asked for a tuple.
    """
    if supervised is None or getattr(output, "loss", None) is None:
        raise InputError(
            "a method that learns adds to the model's loss, so in training the model must be "
            "called with `labels` and must return a ModelOutput; call eval() if this is no training"
        )
    if losses:
        total = kwargs.get("num_items_in_batch")
        share = 1.0 if total is None else supervised.sum() / total
        output.loss = output.loss + share * torch.stack([*losses.values()]).sum().to(output.loss)
    return output


def averaged(outputs: Sequence[Any]) -> Any:
    """The output of a step's first pass, with the mean of all losses."""
    first = outputs[0]
    if len(outputs) > 1:
        first.loss = torch.stack([output.loss for output in outputs]).mean()
    return first
