"""Replies: what came of a recipe on some questions, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.bench.stats import Z, wilson
from foveate.tune.targets import COSTS


@dataclass(frozen=True)
class Replies:
    """Question by question.

    Args:
        right: whether each answer is right; empty where right answers are not known.
        agrees: whether it is the unpruned model's.
        kl: divergence of the first word from the unpruned model's, in nats.
        state: cosine of the last prompt token's final state with the unpruned model's; empty where
            that is not compared.
        before: FLOPs and cache bytes of the prompts with all tokens.
        after: the same with the recipe.
    """

    right: tuple[bool, ...] = ()
    agrees: tuple[bool, ...] = ()
    kl: tuple[float, ...] = ()
    state: tuple[float, ...] = ()
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.agrees)

    def __add__(self, other: Replies) -> Replies:
        """These, and then others."""
        return Replies(
            self.right + other.right,
            self.agrees + other.agrees,
            self.kl + other.kl,
            self.state + other.state,
            (self.before[0] + other.before[0], self.before[1] + other.before[1]),
            (self.after[0] + other.after[0], self.after[1] + other.after[1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; truth values are 0 and 1."""
        return {
            "right": [int(x) for x in self.right],
            "agrees": [int(x) for x in self.agrees],
            "kl": list(self.kl),
            "state": list(self.state),
            "before": list(self.before),
            "after": list(self.after),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Replies:
        """What `to_dict` has said."""
        right, agrees = (tuple(map(bool, data[name])) for name in ("right", "agrees"))
        before, after = (tuple(data[name]) for name in ("before", "after"))
        return cls(right, agrees, tuple(data["kl"]), tuple(data["state"]), before, after)

    def judged(self, quality: str) -> tuple[float, ...]:
        """How good each reply is, by one of `foveate.tune.targets.OBJECTIVES`."""
        known = {"accuracy": self.right, "agreement": self.agrees, "state": self.state}
        return known[quality]


@dataclass(frozen=True)
class Score:
    """What replies say of a recipe against the unpruned model on the same questions.

    Args:
        asked: questions.
        quality: mean of what is judged.
        interval: its 95 % interval.
        change: points of quality lost or won against the unpruned model, and their 95 % interval.
        metrics: what targets bound, in their units; costs are shares of the unpruned model's.
    """

    asked: int
    quality: float
    interval: tuple[float, float]
    change: tuple[float, float, float]
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, replies: Replies, unpruned: Replies, quality: str, times: dict[str, float]
    ) -> Score:
        """Compare replies with the unpruned model's.

        Args:
            replies: of the recipe.
            unpruned: to the same questions, or to more.
            quality: see `Replies.judged`.
            times: shares of its time, where they were measured.
        """
        good, asked = replies.judged(quality), len(replies)
        flops, kv = (
            a / b if b else 1.0 for a, b in zip(replies.after, replies.before, strict=True)
        )
        metrics = {
            "agreement": 100 * sum(replies.agrees) / asked,
            "kl": math.fsum(replies.kl) / asked,
            "flops": flops,
            "kv": kv,
            **times,
        }
        if replies.right:
            metrics["accuracy"] = difference(unpruned.right[:asked], replies.right)[0]
        if replies.state:
            metrics["state"] = math.fsum(replies.state) / asked
        change = difference(unpruned.judged(quality)[:asked], good)
        return cls(asked, math.fsum(good) / asked, _interval(good), change, metrics)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the change is in points."""
        return {
            "asked": self.asked,
            "quality": self.quality,
            "interval": list(self.interval),
            "change": self.change[0],
            "change_interval": list(self.change[1:]),
            **{name: self.metrics[name] for name in ("kl", "state") if name in self.metrics},
            "agreement": self.metrics["agreement"] / 100,
            "costs": {name: self.metrics[name] for name in COSTS if name in self.metrics},
        }


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Points that the second wins over the first on the same questions, and their 95 % interval by
    the normal approximation, as `foveate.bench.stats.Paired` has it of right and wrong.
    """
    change, half = _mean([b - a for a, b in zip(first, second, strict=True)])
    return 100 * change, 100 * (change - half), 100 * (change + half)


def _interval(good: Sequence[float]) -> tuple[float, float]:
    """The interval of a share (Wilson), or of a mean."""
    if set(good) <= {0, 1}:
        return wilson(round(sum(good)), len(good))
    mean, half = _mean(good)
    return mean - half, mean + half


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    count, total = len(values), math.fsum(values)
    spread = math.fsum(value**2 for value in values) - total**2 / count
    return total / count, Z * math.sqrt(max(spread, 0.0)) / count
