"""Approximate: a method that computes less in encoder layers, and removes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core.fields import Natural, check_ascending
from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.core.step import Effect, ModelFacts, Positions, Step
from foveate.core.tokens import VisualTokens
from foveate.errors import BudgetError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class Approximate(Method):
    """Computes some encoder layers approximately; every token is there after each of them.

    Subclasses implement `attend`, or `enter` and `leave`.

    Args:
        layers: encoder layers that are computed so; `None` for all that are read.
        keep: `None`: nothing is removed.
        positions: without effect, as nothing is removed.
    """

    removes = False
    effect: ClassVar[Effect] = "attend"
    layers: tuple[Natural, ...] | None = dataclasses.field(default=None, kw_only=True)
    keep: None = dataclasses.field(default=None, kw_only=True)
    positions: Positions | None = dataclasses.field(default=None, kw_only=True)

    def check_fields(self) -> None:
        """As in `Method`; `layers` ascend.

        Raises:
            LayerError: `layers` is empty or not ascending.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        check_ascending(self.layers)

    def check_budget(self, steps: int | None) -> None:
        """There is no budget.

        Raises:
            BudgetError: one is given.
        """
        if self.keep is not None:
            raise BudgetError(
                f"{self.slug} removes no tokens, so that it takes no keep; got {quoted(self.keep)}"
            )

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A step in each of the layers."""
        read = range(model.feature_layer + 1)
        layers: Sequence[int] = read if self.layers is None else self.layers
        return tuple(
            Step("vision", layer, whole=True, effects=(type(self).effect,)) for layer in layers
        )

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """All of them."""
        return remaining

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """All tokens, as they are."""
        return Reduction(_all(tokens.index))


def _all(index: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device).expand_as(index)
