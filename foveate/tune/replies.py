"""Replies: what came of a recipe on some questions, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.bench.stats import Paired, wilson


@dataclass(frozen=True)
class Replies:
    """Question by question.

    Args:
        right: whether each answer is right; empty where right answers are not known.
        agrees: whether it is the unpruned model's.
        kl: divergence of the first word from the unpruned model's, in nats.
        before: FLOPs and cache bytes of the prompts with all tokens.
        after: the same with the recipe.
    """

    right: tuple[bool, ...] = ()
    agrees: tuple[bool, ...] = ()
    kl: tuple[float, ...] = ()
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
            (self.before[0] + other.before[0], self.before[1] + other.before[1]),
            (self.after[0] + other.after[0], self.after[1] + other.after[1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; truth values are 0 and 1."""
        return {
            "right": [int(x) for x in self.right],
            "agrees": [int(x) for x in self.agrees],
            "kl": list(self.kl),
            "before": list(self.before),
            "after": list(self.after),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Replies:
        """What `to_dict` has said."""
        right, agrees = (tuple(map(bool, data[name])) for name in ("right", "agrees"))
        before, after = (tuple(data[name]) for name in ("before", "after"))
        return cls(right, agrees, tuple(data["kl"]), before, after)

    def judged(self, quality: str) -> tuple[bool, ...]:
        """What counts as good of each question: `accuracy` or `agreement`."""
        return self.right if quality == "accuracy" else self.agrees


@dataclass(frozen=True)
class Score:
    """What replies say of a recipe against the unpruned model on the same questions.

    Args:
        asked: questions.
        quality: share of good answers.
        interval: its 95 % interval.
        paired: against the unpruned model.
        kl: mean divergence of first words, in nats.
        costs: shares of the unpruned model's, by name.
    """

    asked: int
    quality: float
    interval: tuple[float, float]
    paired: Paired
    agreement: float
    kl: float
    costs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, replies: Replies, unpruned: Replies, quality: str, times: dict[str, float]
    ) -> Score:
        """Compare replies with the unpruned model's.

        Args:
            replies: of the recipe.
            unpruned: to the same questions, or to more.
            quality: `accuracy` or `agreement`.
            times: shares of its time, where they were measured.
        """
        good, asked = replies.judged(quality), len(replies)
        paired = Paired.of(unpruned.judged(quality)[:asked], good)
        flops, kv = (
            a / b if b else 1.0 for a, b in zip(replies.after, replies.before, strict=True)
        )
        return cls(
            asked,
            sum(good) / asked,
            wilson(sum(good), asked),
            paired,
            sum(replies.agrees) / asked,
            math.fsum(replies.kl) / asked,
            {"flops": flops, "kv": kv, **times},
        )

    @property
    def metrics(self) -> dict[str, float]:
        """In the units of targets."""
        return {
            "accuracy": 100 * self.paired.difference,
            "agreement": 100 * self.agreement,
            "kl": self.kl,
            **self.costs,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; shares are not in per cent, but the change is in points."""
        change, half = 100 * self.paired.difference, 100 * self.paired.half_width
        return {
            "asked": self.asked,
            "quality": self.quality,
            "interval": list(self.interval),
            "change": change,
            "change_interval": [change - half, change + half],
            "agreement": self.agreement,
            "kl": self.kl,
            "costs": self.costs,
        }


def difference(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """Points that the second wins over the first on the same questions, and their 95 % interval."""
    paired = Paired.of(first, second)
    change, half = 100 * paired.difference, 100 * paired.half_width
    return change, change - half, change + half
