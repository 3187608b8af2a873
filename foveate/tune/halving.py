"""Successive halving over questions: all candidates answer a few, the best of them more.

Halving: Jamieson and Talwalkar 2016, arXiv:1502.07943. A candidate is also stopped as soon as a
95 % interval of paired differences says that it is behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from foveate.tune.planning import Recipe, Sketch
from foveate.tune.replies import Replies, Score, difference
from foveate.tune.targets import COSTS, Aim

ETA = 3
"""Of so many candidates one goes on to the next rung, with so many times the questions."""
MARGIN = 0.99
"""The share of a bound that recipes are scaled to, as questions differ."""
SURELY = 1.02
"""A recipe whose measured cost is so many times a bound is stopped."""
ABOUT_EQUAL = 1.01
"""A recipe that costs this much more than another still counts as costing the same."""


@dataclass
class Candidate:
    """A recipe in the search.

    Args:
        number: of its trial.
        recipe: the methods.
        sketch: what they were scaled from.
        limits: the shares of `flops` and `kv` that they were scaled to.
        published: whether its fields are as published.
        planned: shares by the account.
        replies: to the questions so far.
        times: measured shares of time, where they are asked for.
        score: what replies say.
        why_out: why it did not get to the last rung; empty where it did.
    """

    number: int
    recipe: Recipe
    sketch: Sketch
    limits: dict[str, float]
    published: bool = False
    planned: dict[str, float] = field(default_factory=dict)
    replies: Replies = field(default_factory=Replies)
    times: dict[str, float] = field(default_factory=dict)
    score: Score | None = None
    why_out: str = ""

    @property
    def scored(self) -> Score:
        """The score of a candidate that was asked something."""
        assert self.score is not None
        return self.score


def rungs(first: int, questions: int) -> list[int]:
    """How many questions a candidate has answered after each rung, ascending."""
    found, size = [], max(first, 1)
    while size * 1.5 < questions:
        found.append(size)
        size *= ETA
    return [*found, questions]


def tightened(candidate: Candidate, aim: Aim) -> dict[str, float]:
    """Limits that make up for what was measured above a bound; empty where nothing was.

    Text and images differ from the typical ones of the account, and some methods decide by the
    tokens how many survive.
    """
    costs = candidate.scored.metrics
    bounds = {name: aim.bound(name) for name in candidate.limits}
    if all(bound is None or costs[name] <= bound for name, bound in bounds.items()):
        return {}
    return {
        name: limit if bound is None else limit * min(MARGIN * bound / costs[name], 1.0)
        for (name, limit), bound in zip(candidate.limits.items(), bounds.values(), strict=True)
    }


def dominates(one: Score, other: Score, aim: Aim) -> bool:
    """Whether a score is as good in everything that is searched for, and better in something."""
    mine, its = ([s.quality, *(-s.metrics[c] for c in aim.minimize)] for s in (one, other))
    return all(a >= b for a, b in zip(mine, its, strict=True)) and mine != its


def promoted(alive: Sequence[Candidate], aim: Aim) -> list[Candidate]:
    """Those that go on: the third that fewest others dominate, then the nearest to the unpruned."""

    def place(candidate: Candidate) -> tuple[float, float, float, int]:
        score = candidate.scored
        above = sum(dominates(other.scored, score, aim) for other in alive)
        return above, -score.quality, score.metrics["kl"], candidate.number

    kept = sorted(alive, key=place)[: math.ceil(len(alive) / ETA)]
    return sorted(kept, key=lambda candidate: candidate.number)


def why_stop(
    candidate: Candidate, unpruned: Replies, finalists: Sequence[Candidate], aim: Aim
) -> str:
    """Why a candidate need not be asked more; empty where it must.

    Args:
        candidate: with its replies so far.
        unpruned: the unpruned model's replies to at least the same questions.
        finalists: candidates that have answered all questions.
        aim: what is searched for.
    """
    score, quality = candidate.scored, aim.quality
    for target in aim.targets:
        if target.metric in COSTS and score.metrics[target.metric] > SURELY * target.value:
            return (
                f"measured {target.metric} is {score.metrics[target.metric]:.3f}x, above {target}"
            )
    mine = candidate.replies.judged(quality)
    if (bound := aim.bound("accuracy")) is not None:
        right = candidate.replies.right
        change, low, high = difference(unpruned.right[: len(right)], right)
        if high < bound:
            return f"{change:+.1f} points ({low:+.1f} to {high:+.1f}), below accuracy>={bound:g}"
    for other in finalists:
        costs = other.scored.metrics
        if any(costs[name] > ABOUT_EQUAL * score.metrics[name] for name in aim.costs):
            continue
        theirs = other.replies.judged(quality)[: len(mine)]
        change, low, high = difference(theirs, mine)
        if high < 0:
            return (
                f"{change:+.1f} points ({low:+.1f} to {high:+.1f}) against trial {other.number}, "
                "which costs no more"
            )
    return ""
