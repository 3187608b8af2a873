"""Methods that drop tokens several times between decoder layers.

The layers are given, or published ones are carried over to the depth of the model at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.core.budget import Keep, PerRequest, check_keep, steps_in
from foveate.core.budget import count as budget_count
from foveate.core.fields import check_ascending
from foveate.core.method import Method
from foveate.core.step import ModelFacts, Need, Step
from foveate.errors import LayerError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class Curve:
    """What drops leave where `keep` is one number: the mean over the layers after the first drop.

    Args:
        shares: published shares of the drops.
        layers: how many decoder layers each of them holds for.
    """

    shares: tuple[float, ...]
    layers: tuple[int, ...]

    def rescaled(self, mean: float) -> tuple[float, ...]:
        """The shares, each raised to one and the same power, so that they have a mean."""
        return _rescaled(self.shares, self.layers, mean)


@dataclass(frozen=True)
class Drop(Step):
    """A step that takes its budget from one entry of `keep`.

    Args:
        entry: which entry, 0-based.
        curve: of all drops, where `keep` has no entries, but is the mean.
    """

    entry: int = 0
    curve: Curve | None = None


class Scheduled(Method):
    """Base of methods with a field `layers`, the decoder layers before which tokens are dropped.

    With `layers=None`, published layers are scaled to the depth of the model; where `keep` has
    another number of entries than was published, stages are equal. Each layer is then moved to the
    nearest one whose attention can rank tokens. On a model that has fewer of those than drops,
    drops that meet become one, with the later budget.

    A `keep` of one number, where the published one is a schedule, is the mean over the decoder
    layers from the first drop on: published shares are rescaled to it. A tuple says what survives
    each drop.
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
        check_ascending(self.layers)
        if self.layers is not None and self.layers[0] < self._first:
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
    def published_shares(self) -> tuple[float, ...] | None:
        """What is published to survive each drop; `None` where that is one number."""
        shares = getattr(type(self), "keep", None)
        return shares if isinstance(shares, tuple) else None

    @property
    def is_mean(self) -> bool:
        """Whether the budget is a mean over layers, and not what survives a drop."""
        budget, shares = self.budget, self.published_shares
        values = budget.values if isinstance(budget, PerRequest) else (budget,)
        if shares is None or not isinstance(values, tuple):
            return False
        if not all(isinstance(value, float | int) for value in values):
            return False
        return self.step_count in (None, len(shares))

    @property
    def drop_count(self) -> int:
        """Drops that the method wants where `layers` are not given."""
        if self.is_mean:
            return len(self.published_shares or ())
        return 1 if self.budget is None else steps_in(self.budget)

    def check_budget(self, steps: int | None) -> None:
        """Check the budget, against `layers` where they are given.

        Raises:
            BudgetError: it is out of range or does not fit.
        """
        if self.budget is not None:
            check_keep(self.budget, None if self.is_mean else self.step_count)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Method`; the entry of the budget is the step's."""
        if self.budget is None:
            return remaining
        rounding = type(self).rounding
        if isinstance(step, Drop) and step.curve is not None:
            mean = self._mean(total, row)
            return min(max(rounding(total * step.curve.rescaled(mean)[number]), 1), remaining)
        entry = step.entry if isinstance(step, Drop) else number
        return min(
            budget_count(self.budget, total, step=entry, row=row, rounding=rounding), remaining
        )

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
        drops = self.drops(model)
        curve = self.curve(model, drops)
        return tuple(
            Drop("llm", layer, self.needs_of(layer), entry=entry, curve=curve)
            for layer, entry in drops
        )

    def curve(self, model: ModelFacts, drops: Sequence[tuple[int, int]]) -> Curve | None:
        """What drops leave if `keep` is a mean.

        Args:
            model: the model at hand.
            drops: (first decoder layer that sees what it leaves, entry) of each, ascending.
        """
        if not self.is_mean or self.published_shares is None:
            return None
        ends = [*(layer for layer, _ in drops[1:]), model.text_layers]
        layers = tuple(end - first for (first, _), end in zip(drops, ends, strict=True))
        return Curve(tuple(self.published_shares[entry] for _, entry in drops), layers)

    def _mean(self, total: int, row: int) -> float:
        """The budget as the share of an image's tokens that layers see on average."""
        budget = self.budget
        value = budget.values[row] if isinstance(budget, PerRequest) else budget
        assert isinstance(value, float | int)  # what `is_mean` means
        return value if isinstance(value, float) else min(value / total, 1.0)

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
        return _within((i + self.ranked_before for i in model.attention_layers), first, model)


@functools.lru_cache(maxsize=256)
def _rescaled(shares: tuple[float, ...], layers: tuple[int, ...], mean: float) -> tuple[float, ...]:
    """See `Curve.rescaled`."""
    low, high = 0.0, 1.0

    def rescaled(power: float) -> tuple[float, ...]:
        return tuple(share**power for share in shares)

    def above(power: float) -> bool:
        parts = zip(rescaled(power), layers, strict=True)
        return sum(share * count for share, count in parts) > mean * sum(layers)

    while above(high) and high < 2**20:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return rescaled(high) if mean < 1 else tuple(1.0 for _ in shares)


def ranked_before(
    wanted: float,
    model: ModelFacts,
    slug: str,
    *,
    drops: bool = True,
    otherwise: str = "use a pre_llm method",
) -> int:
    """The layer nearest to a wanted one that follows a layer whose attention can rank tokens.

    Args:
        wanted: the layer; scaled ones may lie between two.
        model: the model's facts.
        slug: the method, for the message.
        drops: whether tokens are dropped before it, which some models allow from a later layer on.
        otherwise: what to do where there is none, for the message.

    Raises:
        LayerError: there is none.
    """
    first = max(model.first_llm_layer, 1) if drops else 1
    legal = _within((i + 1 for i in model.attention_layers), first, model)
    return nearest((wanted,), legal, slug, otherwise)[0][0]


def ranked_at(wanted: float, model: ModelFacts, slug: str) -> int:
    """The same for a layer before which its own attention ranks tokens."""
    legal = _within(model.attention_layers, model.first_llm_layer, model)
    return nearest((wanted,), legal, slug)[0][0]


def keyed_before(wanted: float, model: ModelFacts, slug: str) -> int:
    """The same for a layer that follows one with keys of single tokens."""
    legal = _within((i + 1 for i in model.keyed_layers), max(model.first_llm_layer, 1), model)
    return nearest((wanted,), legal, slug)[0][0]


def _within(layers: Iterable[int], first: int, model: ModelFacts) -> list[int]:
    return [layer for layer in layers if first <= layer <= model.last_llm_layer]


def moved(published: int, layer: int, model: ModelFacts) -> str:
    """What a report says where a method acts before another layer than published."""
    return (
        f"it acts before layer {layer} of this {model.model_type}; the published layer {published} "
        f"follows one that {why_not_ranked(model, published - 1)}"
    )


def why_not_ranked(model: ModelFacts, layer: int) -> str:
    """Why a decoder layer cannot give what ranks tokens, as a predicate."""
    if layer in model.recurrent_layers:
        return "keeps a running state and has no keys of single tokens"
    if layer in model.keyless_layers:
        return "mixes no tokens"
    if layer not in model.keyed_layers:
        return "reads the keys of an earlier layer and makes none"
    if layer not in model.attention_layers:
        indexed = model.layer_kinds[layer] == "indexed_attention"
        return f"sees only {'what an indexer chooses' if indexed else 'a window'} of the sequence"
    return (
        f"comes before layer {model.first_llm_layer}, the first that tokens may be dropped before"
    )


def nearest(
    wanted: Sequence[float],
    legal: Sequence[int],
    slug: str,
    otherwise: str = "use a pre_llm method",
) -> list[tuple[int, int]]:
    """The legal layer nearest to each wanted one, each taken once as long as there are enough.

    Args:
        wanted: layers, ascending.
        legal: layers to choose from, ascending.
        slug: the method, for the message.
        otherwise: what to do where there is no legal layer, for the message.

    Returns:
        (layer, entry) ascending; the entry is the last that wants the layer.

    Raises:
        LayerError: there is no legal layer.
    """
    if not legal:
        raise LayerError(f"{slug}: no decoder layer of this model can rank tokens; {otherwise}")
    if len(wanted) > len(legal):
        met = {min(legal, key=lambda layer: abs(layer - want)): i for i, want in enumerate(wanted)}
        return sorted(met.items())
    chosen: list[int] = []
    for want in wanted:
        free = [layer for layer in legal if layer not in chosen]
        chosen.append(min(free, key=lambda layer: abs(layer - want)))
    return [(layer, entry) for entry, layer in enumerate(sorted(chosen))]
