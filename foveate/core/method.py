"""Method: what a paper becomes.

A method is a frozen dataclass of the paper's hyper-parameters. It names the steps at which it acts
and decides which visual tokens survive there; slicing is the engine's work.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from foveate.core.attention import LayerAttention, LayerShape
from foveate.core.budget import Keep, check_keep, plain_keep
from foveate.core.budget import count as budget_count
from foveate.core.fields import MisfitError, check_fields, fit, hints_of, spell
from foveate.core.reduction import Reduction
from foveate.core.step import ModelFacts, PartialCompute, Positions, Stage, Step
from foveate.core.tokens import VisualTokens
from foveate.errors import (
    BudgetError,
    FoveateError,
    LayerError,
    UnsupportedModelError,
)
from foveate.io.quoting import quoted, shown


class Method(ABC):
    """Base of all methods; subclasses are frozen dataclasses registered with `register`."""

    slug: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    does: ClassVar[str] = ""
    rounding: ClassVar[Callable[[float], int]] = math.floor
    published_positions: ClassVar[Positions] = "renumbered"
    note: ClassVar[str] = ""  # what every report must say of the method; see `note_on`
    field_errors: ClassVar[Mapping[str, type[FoveateError]]] = {}  # where not as usual
    adaptive: ClassVar[bool] = False  # whether the tokens decide how many of them survive
    removes: ClassVar[bool] = True  # whether any token is removed; else less is computed of all
    encoders_alone: ClassVar[bool] = False  # whether it is not for models with a language model
    keep: Keep | None
    positions: Positions | None

    def __post_init__(self) -> None:
        """Check fields against their annotations, and the budget.

        Raises:
            BudgetError: `keep` is out of range or of the wrong form.
            FoveateError: see `check_fields`.
        """
        self.check_fields()
        self.check_budget(self.step_count)
        _check_form(self)

    def check_fields(self) -> None:
        """Check all fields but `keep`; numbers of numpy and lists become plain ones and tuples.

        Raises:
            LayerError: a field that speaks of layers does not fit its annotation.
            FoveateError: another one does not.
        """
        object.__setattr__(self, "keep", plain_keep(self.keep))
        check_fields(self, _name(self), lambda field: field != "keep", self._error_of)
        if self.positions not in (None, "original", "renumbered"):
            raise FoveateError(
                "positions must be original, renumbered or None, got "
                f"{quoted(self.positions)} in {_name(self)}"
            )

    @classmethod
    def _error_of(cls, field: str) -> type[FoveateError]:
        """What a wrong value of a field raises."""
        usual = LayerError if "layer" in field else FoveateError
        return cls.field_errors.get(field, usual)

    @property
    def step_count(self) -> int | None:
        """Steps the method has whatever the model, or `None` when `keep` decides."""
        return 1

    def check_budget(self, steps: int | None) -> None:
        """Check `keep` against the number of steps; `None` when the model decides that.

        Raises:
            BudgetError: `keep` is out of range or does not fit.
        """
        check_keep(cast(Keep, self.keep), steps)  # which refuses None, with a reason

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """Tokens of one image that survive a step.

        Args:
            remaining: tokens it has there.
            total: tokens it had where the method began.
            step: the step, as `steps` made it.
            number: which step of the method it is, 0-based.
            row: row of the batch, for per-request budgets.
        """
        assert self.keep is not None  # methods without a `keep` have their own rule
        rounding = type(self).rounding
        return min(
            budget_count(self.keep, total, step=number, row=row, rounding=rounding), remaining
        )

    @abstractmethod
    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """The steps of this method on a model, in stream order."""

    @abstractmethod
    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Reduce G images of V tokens to `count` tokens each."""

    def reinsert(self, tokens: VisualTokens, kept: Tensor, now: Tensor) -> Tensor:
        """States with which all tokens of G images go on where the suspended ones come back.

        Args:
            tokens: all V of them, as they were when some were suspended. Of tokens that leave an
                encoder at several steps, each is as it was when it left.
            kept: (G, K) which of the V were not suspended, ascending between decoder layers.
            now: (G, K, D) states of those.

        Returns:
            (G, V, D). By default suspended tokens come back as they went.
        """
        return tokens.x.scatter(1, kept[..., None].expand_as(now), now)

    def attend(self, tokens: VisualTokens, layer: LayerAttention) -> Tensor:
        """The attention of an encoder layer, where a step has the effect `attend`.

        Args:
            tokens: all that the layer sees; `x` is its input.
            layer: its queries, keys and values, of special rows too.

        Returns:
            (B, N, H, d). By default what the layer computes itself.
        """
        return layer.plain()

    def attend_flops(self, step: Step, shape: LayerShape) -> int:
        """FLOPs of what `attend` computes of one image, a multiply-add counted as 2.

        By default those of the layer itself: products of all queries with all keys, and of all
        weights with all values.
        """
        return 4 * shape.mixed * shape.rows**2

    def enter(self, tokens: VisualTokens, states: Tensor) -> Tensor:
        """What goes through an encoder layer, where a step has the effect `around`.

        Args:
            tokens: all that there are.
            states: (G, V, W) the layer's input: the rows of each token, one after the other.

        Returns:
            (G, M, W) of as many tokens as `entering` promises. By default all.
        """
        return states

    def leave(self, tokens: VisualTokens, states: Tensor, passed: Tensor) -> Tensor:
        """What all tokens go on with after that layer.

        Args:
            tokens: as `enter` was given them, with what it has noted in their `memory`.
            states: (G, V, W) as `enter` was given them.
            passed: (G, M, W) what the layer has made of what entered it.

        Returns:
            (G, V, W). By default `passed`.
        """
        return passed

    def entering(self, tokens: int, step: Step) -> int:
        """How many of an image's tokens go through a layer, where a step has the effect `around`;
        rows that stand for others count too.
        """
        return tokens

    def partial_compute(self, model: ModelFacts) -> tuple[PartialCompute, ...]:
        """What decoder layers compute of visual tokens, where that is less than everything."""
        return ()

    def learned(self, model: ModelFacts) -> nn.Module | None:
        """New parameters of a method that learns. `prepare` makes them part of the model."""
        return None

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """FLOPs of what the method has learned, for one image at a step.

        Args:
            model: the model.
            step: the step.
            tokens: tokens that the image has there.
            grid: (height, width) of its tokens before anything was removed.
        """
        return 0

    def note_on(self, model: ModelFacts) -> str:
        """What a report of a model must say of the method; empty for nothing."""
        return self.note

    def positions_on(self, model: ModelFacts) -> Positions:
        """What becomes of positions on a model: the field if it is given, else what is published.

        Raises:
            UnsupportedModelError: renumbering is asked for where it has no meaning.
        """
        if model.one_dimensional:
            return self.positions or self.published_positions
        if self.positions == "renumbered":
            raise UnsupportedModelError(
                f"{self.slug} asks for renumbered positions, but {model.model_type} places visual "
                "tokens in time, height and width (M-RoPE), where renumbering has no meaning; use "
                "positions='original' or leave it out"
            )
        return "original"

    def to_dict(self) -> dict[str, Any]:
        """The method and its hyper-parameters as plain JSON values."""
        return {"method": self.slug, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class Scorer(Method):
    """A method that scores tokens and keeps the highest."""

    @abstractmethod
    def scores(self, tokens: VisualTokens) -> Tensor:
        """Return (G, V) scores, higher is kept, for G images of V tokens."""

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` highest scores of each image, in raster order."""
        return Reduction.top(self.scores(tokens), count)


class Adaptive(Method):
    """A method that decides by the tokens how many of them survive.

    It acts after the encoder. Its `keep` may be `None`.
    """

    adaptive = True

    def check_budget(self, steps: int | None) -> None:
        """Check `keep` if there is one.

        Raises:
            BudgetError: `keep` is out of range or does not fit.
        """
        if self.keep is not None:
            super().check_budget(steps)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Method`, or all without a `keep`; `reduce_each` finds it as `tokens.quota`."""
        if self.keep is None:
            return remaining
        return super().count(remaining, total, step, number, row)

    @abstractmethod
    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Reduce G images of V tokens, each to a number of its own.

        Returns:
            Members of the G, and their reduction: a part for each number of survivors. Every member
            is in one part.
        """

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Not used: `reduce_each` decides the count."""
        raise NotImplementedError(f"{self.slug} decides by itself how many tokens survive")


def _name(method: Method) -> str:
    """What a method is called in a message."""
    return shown(getattr(method, "slug", type(method).__name__))


def _check_form(method: Method) -> None:
    """Refuse forms of `keep` that its annotation leaves out; all numbers count as one form."""
    hint = hints_of(type(method)).get("keep", Keep)
    forms = typing.get_args(hint) or (hint,)
    if method.keep is None and not {None, types.NoneType}.intersection(forms):
        check_keep(cast(Keep, None))  # which says what it may be
    if isinstance(method.keep, float | int) and not {int, float}.isdisjoint(forms):
        return
    try:
        fit(method.keep, hint)
    except MisfitError:
        raise BudgetError(
            f"keep must be {spell(hint)}, got {quoted(method.keep)} in {_name(method)}"
        ) from None


def by_count(counts: Tensor) -> dict[int, list[int]]:
    """Group images by how many of their tokens survive.

    Args:
        counts: (G) integers.

    Returns:
        Count -> members, both ascending.
    """
    groups: dict[int, list[int]] = {}
    for member, count in enumerate(counts.tolist()):
        groups.setdefault(count, []).append(member)
    return dict(sorted(groups.items()))
