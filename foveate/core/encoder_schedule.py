"""Methods that remove tokens several times inside the encoder.

The layers are given, or published ones are carried over to the depth of the encoder at hand.
"""

from __future__ import annotations

from typing import ClassVar, cast

from foveate.core.budget import Keep, check_keep, steps_in
from foveate.core.budget import count as budget_count
from foveate.core.fields import check_ascending
from foveate.core.method import Method
from foveate.core.schedule import Drop, nearest
from foveate.core.step import ModelFacts, Step
from foveate.errors import LayerError
from foveate.io.quoting import quoted


class EncoderScheduled(Method):
    """Base of methods with a field `layers`, the encoder layers at which tokens are removed.

    With `layers=None`, published layers are scaled to the layers that are read; where `keep` has
    another number of entries than was published, stages are equal. In an encoder with fewer layers
    than entries, those that meet become one, with the later budget.
    """

    published_layers: ClassVar[tuple[int, ...]] = ()
    published_depth: ClassVar[int] = 12
    first_layer: ClassVar[int] = 0  # the first layer at which the method can act
    lasting: ClassVar[int] = 0  # how many layers later tokens are gone
    layers: tuple[int, ...] | None

    def check_fields(self) -> None:
        """As in `Method`; layers ascend.

        Raises:
            LayerError: `layers` is empty, not ascending, or begins too early.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        check_ascending(self.layers)
        if self.layers is not None and self.layers[0] < self.first_layer:
            raise LayerError(
                f"{self.slug} goes by the layer before, so layers must begin at "
                f"{self.first_layer} or later, got {quoted(self.layers)}"
            )

    @property
    def step_count(self) -> int | None:
        """One entry of `keep` for each of `layers`; with `layers=None`, `keep` decides."""
        return None if self.layers is None else len(self.layers)

    def check_budget(self, steps: int | None) -> None:
        """As in `Method`, against `layers`: there may be more steps than entries, or fewer."""
        check_keep(cast(Keep, self.keep), self.step_count)  # which refuses None, with a reason

    def drops(self, model: ModelFacts) -> list[tuple[int, int]]:
        """(layer, entry of `keep`) of each of the layers, ascending.

        Raises:
            LayerError: the encoder has no layer at which the method can act.
        """
        if self.layers is not None:
            return [(layer, entry) for entry, layer in enumerate(self.layers)]
        legal = range(self.first_layer, model.feature_layer + 1 - self.lasting)
        if not legal:
            raise LayerError(
                f"{self.slug} removes tokens between encoder layers, but what reads the encoder "
                f"sees the output of layer {model.feature_layer} of {model.vision_layers}"
            )
        assert self.keep is not None  # as annotated
        entries, read = steps_in(self.keep), model.feature_layer + 1
        wanted = [read * (i + 1) / (entries + 1) for i in range(entries)]
        if entries == len(self.published_layers):
            wanted = [read * i / self.published_depth for i in self.published_layers]
        return nearest(wanted, legal, self.slug)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Method`; the entry of `keep` is the step's."""
        assert self.keep is not None  # as annotated
        entry = step.entry if isinstance(step, Drop) else number
        rounding = type(self).rounding
        kept = budget_count(self.keep, total, step=entry, row=row, rounding=rounding)
        return min(kept, remaining)
