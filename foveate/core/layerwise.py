"""Methods that remove some tokens in every layer of the encoder.

How many is a number or a schedule, `r`, or follows from what is to survive the last layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foveate.core.budget import PerRequest, check_keep
from foveate.core.budget import count as budget_count
from foveate.core.method import Method
from foveate.core.step import Effect, ModelFacts, Need, Step
from foveate.errors import BudgetError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class LayerStep(Step):
    """A step within one of the layers.

    Args:
        r: tokens to remove.
        part: (number of the layer from 1, layers in all), for an equal share of `keep`.
    """

    r: int = 0
    part: tuple[int, int] = (1, 1)


class Layerwise(Method):
    """Base of methods with a field `r`, the tokens removed between attention and MLP of each layer.

    `r` is one number, or one for each layer from the first (0 after). A `keep` is what survives the
    last layer, by equal r in all layers; `None` uses `r`.
    """

    limit: ClassVar[str] = "all but one of the tokens"  # what `most` says, in words
    r: int | tuple[int, ...]

    def check_budget(self, steps: int | None) -> None:
        """`keep` speaks about the end of all steps, so it is one share or count.

        Raises:
            BudgetError: it is out of range, or a schedule.
        """
        if isinstance(self.keep, tuple | PerRequest):
            raise BudgetError(
                f"{self.slug} takes one share or count as keep, got {quoted(self.keep)}"
            )
        if self.keep is not None:
            check_keep(self.keep, 1)

    def schedule(self, layers: int) -> tuple[int, ...]:
        """Tokens to remove in each of some layers."""
        if isinstance(self.r, tuple):
            return (self.r + (0,) * layers)[:layers]
        return (self.r,) * layers

    def most(self, remaining: int) -> int:
        """How many of the tokens there a layer can remove: all but one."""
        return max(remaining - 1, 0)

    def layer_steps(
        self, model: ModelFacts, signals: tuple[str, ...] = (), effects: tuple[Effect, ...] = ()
    ) -> tuple[LayerStep, ...]:
        """A step within each layer that is read, where the schedule asks for one.

        Args:
            model: the model.
            signals: what each step needs of its own layer.
            effects: of each step.
        """
        read = model.feature_layer + 1
        schedule = self.schedule(model.vision_layers)[:read]
        return tuple(
            LayerStep(
                "vision",
                i,
                tuple(Need(name, (i,)) for name in signals),
                inside=True,
                effects=effects,
                r=r,
                part=(i + 1, read),
            )
            for i, r in enumerate(schedule)
            if r or self.keep is not None
        )

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """What is left after `r`, or its share of `keep`.

        Raises:
            BudgetError: `keep` asks for more than a layer can remove.
        """
        assert isinstance(step, LayerStep)
        most = self.most(remaining)
        if self.keep is None:
            return remaining - min(step.r, most)
        dropped = total - budget_count(
            self.keep, total, step=0, row=row, rounding=type(self).rounding
        )
        layer, layers = step.part
        wanted = total - dropped * layer // layers
        if remaining - wanted > most:
            raise BudgetError(
                f"{self.slug} removes at most {self.limit} in a layer; keep={self.keep} of {total} "
                f"tokens needs {remaining - wanted} of {remaining} in layer {step.layer}. Keep at "
                f"least {math.ceil(total / (layers + 1)) + 1}, or give r a schedule"
            )
        return wanted
