"""The space: which methods, layers, schedules and fields a trial may choose, for a model at hand.

A trial chooses a method in the encoder or after it, one between decoder layers, or both. Each comes
with its published fields, or with fields of the trial's choice. How much it keeps is left open: the
account says how much a budget allows, see `foveate.tune.planning`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from foveate.bench.levels import BASELINES
from foveate.calibration.vflowopt import SearchSpace
from foveate.core import Method, get_method, list_methods
from foveate.core.encoder_schedule import EncoderScheduled
from foveate.core.fields import Range, hints_of
from foveate.core.layerwise import Layerwise
from foveate.core.schedule import Scheduled
from foveate.core.video import VideoMethod
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.methods.vflowopt import VFlowOpt
from foveate.tune.planning import LEAST, Planner, Recipe, Sketch

NOBODY = "none"
DROPS = 3
"""Most drops of a schedule."""
_NOT_SEARCHED = {"keep", "layers", "r", "as_released", "seed", "inflect", "every"}
Part = Callable[[float], Method]


class Space:
    """What trials choose from.

    Args:
        planner: knows the model, and what methods cost on it.
        names: methods that may be used; `None` for all that work and whose budget can be set.
        limits: largest shares of `flops` and `kv`.

    Raises:
        InputError: none of them can be used.
        UnknownMethodError: there is no such method.
    """

    def __init__(
        self, planner: Planner, names: Iterable[str] | None, limits: Mapping[str, float]
    ) -> None:
        self._planner, self._limits = planner, limits
        self.family, self.tokens = planner.family, planner.tokens
        wanted = list_methods() if names is None else [get_method(n).slug for n in names]
        usable = [slug for slug in wanted if names is not None or slug not in BASELINES]
        self.left_out = {slug: why for slug in usable if (why := self._why_not(slug))}
        if names is not None and self.left_out:
            slug, why = next(iter(self.left_out.items()))
            raise InputError(f"--methods: {slug} cannot be tuned here: {why}")
        self.names = tuple(slug for slug in usable if slug not in self.left_out)
        stages = {slug: get_method(slug).stage for slug in self.names}
        self.early = tuple(slug for slug in self.names if stages[slug] != "llm")
        self.late = tuple(slug for slug in self.names if stages[slug] == "llm")
        if not self.names:
            raise InputError("no method can be tuned on this model")

    def published(self) -> list[dict[str, Any]]:
        """What a trial chooses for each method alone with its published fields."""
        alone = []
        for slug in self.names:
            first, second = (slug, NOBODY) if slug in self.early else (NOBODY, slug)
            alone.append({"early": first, "late": second, f"{slug}.fields": "published"})
        return alone

    def draw(self, trial: Any) -> Sketch | None:
        """What an Optuna trial chooses; `None` where that is nothing."""
        early = trial.suggest_categorical("early", [NOBODY, *self.early])
        late = trial.suggest_categorical("late", [NOBODY, *self.late])
        slugs = [slug for slug in (early, late) if slug != NOBODY]
        if not slugs:
            return None
        parts = [self._part(trial, get_method(slug)) for slug in slugs]
        if len(parts) == 1:
            return lambda scale: (parts[0](scale),)
        share = trial.suggest_float("balance", 0.1, 0.9)  # of the scale that the early one takes
        return lambda scale: (parts[0](scale**share), parts[1](scale ** (1 - share)))

    # -- one method

    def _part(self, trial: Any, cls: type[Method]) -> Part:
        if trial.suggest_categorical(f"{cls.slug}.fields", ["published", "searched"]) == (
            "published"
        ):
            return lambda scale: _make(cls, keep=scale)
        if issubclass(cls, VFlowOpt):
            return self._vflowopt(trial)
        fields = self._fields(trial, cls)
        if issubclass(cls, Layerwise):
            return self._layerwise(trial, cls, fields)
        if legal := self._legal(cls):
            return self._scheduled(trial, cls, fields, legal)
        return lambda scale: _make(cls, keep=scale, **fields)

    def _fields(self, trial: Any, cls: type[Method]) -> dict[str, Any]:
        """Fields that have few values, or a range."""
        hints, chosen = hints_of(cls), {}
        for field in dataclasses.fields(cast(Any, cls)):
            name = f"{cls.slug}.{field.name}"
            if field.name in _NOT_SEARCHED:
                continue
            if field.name == "layer":
                if field.default is None and cls.stage == "llm":
                    layers = range(1, self.family.last_llm_layer + 1)
                    chosen["layer"] = trial.suggest_int(name, layers[0], layers[-1])
            elif field.name == "positions":
                if self.family.one_dimensional:
                    chosen["positions"] = trial.suggest_categorical(name, _POSITIONS)
            elif choices := _choices(hints.get(field.name)):
                chosen[field.name] = trial.suggest_categorical(name, choices)
            elif (found := _range(hints.get(field.name))) is not None:
                chosen[field.name] = trial.suggest_float(name, *found)
        return chosen

    def _legal(self, cls: type[Method]) -> list[int]:
        """Layers before which a method with a field `layers` may drop; none for other methods."""
        if issubclass(cls, Scheduled):
            return cast(Scheduled, cls()).legal(self.family)
        if issubclass(cls, EncoderScheduled):
            return list(range(cls.first_layer, self.family.feature_layer + 1 - cls.lasting))
        return []

    def _scheduled(
        self, trial: Any, cls: type[Method], fields: dict[str, Any], legal: Sequence[int]
    ) -> Part:
        """Some drops: the last leaves the scale, those before it a power of it."""
        drops = trial.suggest_int(f"{cls.slug}.drops", 1, min(DROPS, len(legal)))
        at = {trial.suggest_int(f"{cls.slug}.at{n}", 0, len(legal) - 1) for n in range(drops)}
        layers = tuple(legal[n] for n in sorted(at))
        begin = trial.suggest_float(f"{cls.slug}.begin", 0.1, 1.0) if len(layers) > 1 else 1.0
        powers = [begin + (1 - begin) * n / max(len(layers) - 1, 1) for n in range(len(layers))]

        def make(scale: float) -> Method:
            shares = tuple(scale**power for power in powers)
            return _make(cls, keep=shares if len(shares) > 1 else shares[0], layers=layers,
                         **fields)  # fmt: skip

        return make

    def _layerwise(self, trial: Any, cls: type[Method], fields: dict[str, Any]) -> Part:
        """Tokens that are left after each layer: early layers may remove more than later ones."""
        power = trial.suggest_float(f"{cls.slug}.early", 0.15, 1.5, log=True)
        layers = self.family.feature_layer + 1

        def make(scale: float) -> Method:
            left = [
                max(round(self.tokens * scale ** ((n / layers) ** power)), 1)
                for n in range(layers + 1)
            ]
            r = tuple(before - after for before, after in pairwise(left))
            return _make(cls, r=r, **fields)

        return make

    def _vflowopt(self, trial: Any) -> Part:
        """The space of VFlowOpt's own calibration; the scale is what a layer sees on average."""
        names = ("keep", "ratio", "threshold", "cell")
        places = _Places({name: trial.suggest_float(f"vflowopt.{name}", 0, 1) for name in names})

        def make(scale: float) -> Method:
            found = SearchSpace.of(self.family, min(scale, 0.999)).propose(places)
            if found is None:
                raise BudgetError("vflowopt: what its first two drops leave uses up the budget")
            return found

        return make

    def _why_not(self, slug: str) -> str:
        """Why a method is not searched; empty where it is."""
        cls = get_method(slug)
        if cls.encoders_alone:
            return "it is for models without a language model"
        if issubclass(cls, VideoMethod):
            return "it compares the frames of a video"
        after = cls.stage == "pre_llm"  # then the encoder's work is the least there is
        try:
            method = _make(cls, keep=0.5)
            if method.learned(self.family) is not None:
                return "it learns parameters"
            shares = self._planner.shares((_make(cls, keep=LEAST if after else 0.5),))
        except FoveateError as error:
            return str(error)
        over = [name for name, most in self._limits.items() if after and shares[name] > most]
        return (
            f"the encoder, which it leaves whole, takes more than {over[0]}<="
            f"{self._limits[over[0]]:g}x" if over else ""
        )  # fmt: skip


@dataclass(frozen=True)
class _Places:
    """A trial whose numbers are known by where in their range they lie, from 0 to 1."""

    of: Mapping[str, float]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return low + self.of[name] * (high - low)


_POSITIONS = ["original", "renumbered"]


def _make(cls: type[Method], **fields: Any) -> Method:
    return cls(**fields)


def _choices(hint: Any) -> list[Any]:
    """Values of a field that has a few: a truth value, or a literal."""
    members = _members(hint)
    if bool in members:
        return [False, True]
    return [
        v for m in members if typing.get_origin(m) is typing.Literal for v in typing.get_args(m)
    ]


def _range(hint: Any) -> tuple[float, float] | None:
    """The range of a field that is a number, where there is one."""
    for member in _members(hint):
        if typing.get_origin(member) is not typing.Annotated:
            continue
        kind, *extras = typing.get_args(member)
        bounds = [e for e in extras if isinstance(e, Range) and e.high is not None]
        if kind is float and bounds and math.isfinite(cast(float, bounds[0].high)):
            low, high = bounds[0].low, cast(float, bounds[0].high)
            inset = (high - low) / 100
            return low + inset * bounds[0].above, high - inset * bounds[0].below
    return None


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union is of; a type alone."""
    if typing.get_origin(hint) in (None, typing.Annotated, typing.Literal, tuple):
        return (hint,)
    return typing.get_args(hint)


def describe(recipe: Recipe) -> str:
    """A recipe in one line: methods, and fields that are not as published.

    Examples:
        >>> describe((get_method("fastv")(keep=0.25),))
        'fastv keep=0.25'
    """
    return " + ".join(_describe(method) for method in recipe) or "all tokens"


def _describe(method: Method) -> str:
    words = [method.slug]
    for field in dataclasses.fields(cast(Any, method)):
        value = getattr(method, field.name)
        if value != field.default:
            words.append(f"{field.name}={_short(value)}")
    return " ".join(words)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
