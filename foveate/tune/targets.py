"""What a recipe must meet, from text: `accuracy>=-1`, `ttft<=0.5x`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from foveate.errors import InputError
from foveate.io.quoting import quoted

QUALITIES = {
    "accuracy": "points that are lost or won against the unpruned model, as -1",
    "agreement": "per cent of answers that are the unpruned model's, as 98",
    "kl": "nats between first words, as 0.1",
    "state": "cosine of final states of the last prompt token, as 0.95",
}
"""What is measured on answers -> its unit."""
OBJECTIVES = ("accuracy", "agreement", "state")
"""Those that a search can make as good as possible."""
COSTS = ("flops", "kv", "ttft", "latency")
"""Shares of what the unpruned model needs: FLOPs and cache bytes of the prompt, milliseconds to the
first token and to the end of the answer.
"""
TIMED = frozenset({"ttft", "latency"})
_FORM = re.compile(r"\s*([a-z]+)\s*(<=|>=)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)(x?)\s*")


@dataclass(frozen=True)
class Target:
    """A bound on one metric.

    Args:
        metric: of `QUALITIES` or `COSTS`.
        value: the bound. Accuracy is in points, agreement in per cent, KL in nats, a cost is a
            share of the unpruned model's.
    """

    metric: str
    value: float

    @property
    def at_most(self) -> bool:
        """Whether the value is the largest allowed, and not the least."""
        return self.metric in COSTS or self.metric == "kl"

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether measured values keep to it."""
        value = metrics[self.metric]
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.metric}{sign}{self.value:g}{'x' if self.metric in COSTS else ''}"


def parse_target(text: str) -> Target:
    """Read one target.

    Raises:
        InputError: it is none; the message says what is wrong and how it is written.

    Examples:
        >>> parse_target("ttft<=0.5x")
        Target(metric='ttft', value=0.5)
    """
    found = _FORM.fullmatch(text)
    metrics = (*QUALITIES, *COSTS)
    if found is None:
        raise InputError(
            f"--target takes METRIC<=VALUE or METRIC>=VALUE, such as accuracy>=-1 or ttft<=0.5x, "
            f"got {quoted(text)}"
        )
    metric, sign, number, times = found.groups()
    if metric not in metrics:
        raise InputError(f"--target {quoted(text)}: no metric {metric}; there are "
                         f"{', '.join(metrics)}")  # fmt: skip
    try:
        target = Target(metric, float(number))
    except ValueError:
        raise InputError(f"--target {quoted(text)}: {number} is not a number") from None
    if target.at_most != (sign == "<="):
        wanted = "<=" if target.at_most else ">="
        raise InputError(f"--target {quoted(text)}: {metric} is bounded with {wanted}")
    if (metric in COSTS) != bool(times):
        raise InputError(
            f"--target {quoted(text)}: "
            + (f"a cost is a share of the unpruned model's, as {metric}<=0.5x"
               if metric in COSTS else f"{metric} is in {QUALITIES[metric]}, without an x")
        )  # fmt: skip
    _check_range(target, text)
    return target


def _check_range(target: Target, text: str) -> None:
    low, high = {
        "accuracy": (-100, 100),
        "agreement": (0, 100),
        "kl": (0, math.inf),
        "state": (-1, 1),
    }.get(target.metric, (0, 1))
    if not low <= target.value <= high or (target.metric in COSTS and not target.value):
        raise InputError(f"--target {quoted(text)}: {target.metric} lies from {low} to {high:g}")


@dataclass(frozen=True)
class Aim:
    """What is searched for.

    Args:
        targets: what must hold, one for each metric at most.
        minimize: costs to make small; none to make quality as good as the targets allow.
        quality: the metric of `QUALITIES` that the search goes by.
    """

    targets: tuple[Target, ...]
    minimize: tuple[str, ...]
    quality: str

    @classmethod
    def of(
        cls,
        targets: Iterable[str],
        minimize: Iterable[str],
        answered: bool,
        objective: str | None = None,
    ) -> Aim:
        """What the command line asks for.

        Args:
            targets: see `parse_target`.
            minimize: names of `COSTS`.
            answered: whether the questions have answers.
            objective: of `OBJECTIVES`; by default accuracy, or agreement where nothing is answered.

        Raises:
            InputError: a text is wrong, or what is asked for makes no search.
        """
        quality = objective or ("accuracy" if answered else "agreement")
        if quality not in OBJECTIVES:
            raise InputError(f"--objective takes {', '.join(OBJECTIVES)}, got {quoted(quality)}")
        found = tuple(map(parse_target, targets))
        wanted = tuple(dict.fromkeys(minimize))
        named = [target.metric for target in found]
        for metric in named:
            if named.count(metric) > 1:
                raise InputError(f"--target names {metric} twice; give one bound")
        for cost in wanted:
            if cost not in COSTS:
                raise InputError(f"--minimize takes {', '.join(COSTS)}, got {quoted(cost)}")
        if "accuracy" in (*named, quality) and not answered:
            raise InputError(
                "accuracy needs questions with an `answer`; otherwise use agreement or kl"
            )
        _check_search(wanted, set(named), answered)
        return cls(found, wanted, quality)

    @property
    def wants_states(self) -> bool:
        """Whether final states are compared."""
        return "state" in (self.quality, *(target.metric for target in self.targets))

    def bound(self, metric: str) -> float | None:
        """The bound on a metric, if there is one."""
        return next((t.value for t in self.targets if t.metric == metric), None)

    @property
    def timed(self) -> bool:
        """Whether milliseconds are part of it."""
        return bool(TIMED & {*self.minimize, *(target.metric for target in self.targets)})

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that matter: minimised ones first, then bounded ones; FLOPs always."""
        bounded = [target.metric for target in self.targets if target.metric in COSTS]
        return tuple(dict.fromkeys((*self.minimize, *bounded, "flops")))


def _check_search(minimize: Sequence[str], named: set[str], answered: bool) -> None:
    """Refuse what leaves nothing to save, or nothing that must not be lost."""
    if not minimize and not named & set(COSTS):
        raise InputError(
            "nothing to save: name a cost with --minimize, or bound one, as --target flops<=0.5x"
        )
    if minimize and not named & set(QUALITIES):
        bound = "accuracy>=-1" if answered else "agreement>=98"
        raise InputError(f"--minimize needs a bound on quality too, as --target {bound}")
