"""Methods that drop tokens several times between decoder layers.

The layers are given, or published ones are carried over to the depth of the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.budget import Keep, check_keep, steps_in
from foveate.budget import count as budget_count
from foveate.errors import LayerError
from foveate.method import Method, ModelFacts, Need, Step
from foveate.quoting import quoted


@dataclass(frozen=True)
class Drop(Step):
    """A step that takes its budget from one entry of `keep`.

    Args:
        entry: which entry, 0-based.
    """

    entry: int = 0


class Scheduled(Method):
    """Base of methods with a field `layers`, the decoder layers before which tokens are dropped.

    With `layers=None`, published layers are scaled to the depth of the model; where `keep` has
    another number of entries than was published, stages are equal. Each layer is then moved to the
    nearest one whose attention can rank tokens. On a model that has fewer of those than drops,
    drops that meet become one, with the later budget.
    """

    published_layers: ClassVar[tuple[int, ...]]
    published_depth: ClassVar[int] = 32
    ranked_before: ClassVar[int] = 0  # how many layers before a drop its ranking is taken
    first_drop: ClassVar[int] = 0  # the first layer before which the method can drop
    layers: tuple[int, ...] | None

    def check_fields(self) -> None:
        """As in `Method`; layers ascend.

        Raises:
            LayerError: `layers` is not ascending, or begins too early.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        if self.layers is None:
            return
        if list(self.layers) != sorted(set(self.layers)) or not self.layers:
            raise LayerError(f"layers must be ascending and distinct, got {quoted(self.layers)}")
        if self.layers[0] < self._first:
            raise LayerError(
                f"{self.slug} ranks tokens by what a layer before the drop does, so layers "
                f"must begin at {self._first} or later, got {quoted(self.layers)}"
            )

    @property
    def step_count(self) -> int | None:
        """One step per entry of `layers`; with `layers=None`, the model decides."""
        return None if self.layers is None else len(self.layers)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Published layers of a model of the published depth."""
        return self.published_layers

    @property
    def budget(self) -> Keep | None:
        """What survives each drop: `keep`, unless the method says otherwise; `None` for all."""
        return self.keep

    @property
    def drop_count(self) -> int:
        """Drops that the method wants where `layers` are not given."""
        return 1 if self.budget is None else steps_in(self.budget)

    def check_budget(self, steps: int | None) -> None:
        """Check the budget, against `layers` where they are given.

        Raises:
            BudgetError: it is out of range or does not fit.
        """
        if self.budget is not None:
            check_keep(self.budget, self.step_count)

    def count(self, alive: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Method`; the entry of the budget is the step's."""
        if self.budget is None:
            return alive
        entry = step.entry if isinstance(step, Drop) else number
        rounding = type(self).rounding
        return min(budget_count(self.budget, total, step=entry, row=row, rounding=rounding), alive)

    def drops(self, model: ModelFacts) -> list[tuple[int, int]]:
        """(layer, entry of `keep`) of each drop, ascending.

        Raises:
            LayerError: the model has no layer that can rank tokens.
        """
        if self.layers is not None:
            return [(layer, entry) for entry, layer in enumerate(self.layers)]
        return nearest(self._wanted(model), self.legal(model), self.slug)

    def needs_of(self, layer: int) -> tuple[Need, ...]:
        """What a drop before a layer needs: the attention of the layer that ranks."""
        return tuple(Need(name, (layer - self.ranked_before,)) for name in self.needs)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A drop before each of the layers."""
        return tuple(
            Drop("llm", layer, self.needs_of(layer), entry=entry)
            for layer, entry in self.drops(model)
        )

    @property
    def _first(self) -> int:
        return max(self.ranked_before, self.first_drop)

    def _wanted(self, model: ModelFacts) -> list[int]:
        entries = self.drop_count
        if entries == len(self.default_layers):
            return [model.text_layers * i // self.published_depth for i in self.default_layers]
        return [model.text_layers * (i + 1) // (entries + 1) for i in range(entries)]

    def legal(self, model: ModelFacts) -> list[int]:
        """Layers before which the method can drop tokens on a model, ascending."""
        first = max(model.first_llm_layer, self._first)
        places = (layer + self.ranked_before for layer in model.attention_layers)
        return [layer for layer in places if first <= layer < model.text_layers]


def nearest(wanted: Sequence[int], legal: Sequence[int], slug: str) -> list[tuple[int, int]]:
    """The legal layer nearest to each wanted one, each taken once as long as there are enough.

    Args:
        wanted: layers, ascending.
        legal: layers to choose from, ascending.
        slug: the method, for the message.

    Returns:
        (layer, entry) ascending; the entry is the last that wants the layer.

    Raises:
        LayerError: there is no legal layer.
    """
    if not legal:
        raise LayerError(f"{slug}: no decoder layer of this model can rank tokens; give layers")
    if len(wanted) > len(legal):
        met = {min(legal, key=lambda layer: abs(layer - want)): i for i, want in enumerate(wanted)}
        return sorted(met.items())
    chosen: list[int] = []
    for want in wanted:
        free = [layer for layer in legal if layer not in chosen]
        chosen.append(min(free, key=lambda layer: abs(layer - want)))
    return [(layer, entry) for entry, layer in enumerate(sorted(chosen))]
