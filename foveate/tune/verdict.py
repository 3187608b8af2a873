"""The verdict: the front, the recipe that is chosen, and how both do on held-out questions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.tune.adapting import Adapted
from foveate.tune.halving import Candidate, dominates
from foveate.tune.ledger import Ledger, recipe_key
from foveate.tune.planning import Recipe
from foveate.tune.replies import Replies, Score, difference
from foveate.tune.space import describe
from foveate.tune.study import Found
from foveate.tune.targets import Aim

MOST = 8
"""Recipes of the front that held-out questions are put to."""


@dataclass
class Verdict:
    """What a study ends with.

    Args:
        aim: what was searched for.
        found: what the study came to.
        chosen: the best finalist that meets all targets; `None` where none does.
        published: the best such finalist whose fields are as published, for comparison.
        front: finalists that no other is better than in quality and in every cost that matters.
        held_out: replies to the held-out questions, by trial; `None` is the unpruned model.
        adapted: a policy and how it did, where one was asked for.
    """

    aim: Aim
    found: Found
    chosen: Candidate | None
    published: Candidate | None
    front: list[Candidate]
    held_out: dict[int | None, Replies] = field(default_factory=dict)
    adapted: Adapted | None = None

    @classmethod
    def of(cls, found: Found, aim: Aim) -> Verdict:
        """Choose, by the questions of the search alone."""
        met = [c for c in found.finalists if all(t.met(c.scored.metrics) for t in aim.targets)]
        best = sorted(met, key=lambda candidate: _rank(candidate, aim))
        published = next((c for c in best if c.published), None)
        scores = [c.scored for c in met]
        both = Aim(aim.targets, aim.minimize or aim.costs, aim.quality)
        front = [c for c in met if not any(dominates(s, c.scored, both) for s in scores)]
        front.sort(key=lambda candidate: (candidate.scored.metrics[aim.costs[0]], candidate.number))
        return cls(aim, found, best[0] if best else None, published, front)

    @property
    def to_judge(self) -> list[Candidate]:
        """Candidates that held-out questions are put to: chosen, published, and the front."""
        first = [c for c in (self.chosen, self.published) if c is not None]
        others = [c for c in self.front if c not in first]
        return list({c.number: c for c in [*first, *others[:MOST]]}.values())

    def judge(
        self,
        ask: Callable[[Recipe, Sequence[int]], Replies],
        numbers: Sequence[int],
        ledger: Ledger,
        tick: Callable[[], object],
    ) -> None:
        """Ask the held-out questions.

        Args:
            ask: `Asker.ask`.
            numbers: of the questions.
            ledger: what was asked before.
            tick: called after each recipe.
        """
        judged: list[tuple[int | None, Recipe]] = [(None, ())]
        judged += [(c.number, c.recipe) for c in self.to_judge]
        for number, recipe in judged:
            key = f"held out {recipe_key(recipe)}"
            said = ledger.get(key, functools.partial(_asked, ask, recipe, numbers))
            self.held_out[number] = Replies.from_dict(said)
            tick()

    def score(self, candidate: Candidate) -> Score | None:
        """How a candidate does on held-out questions, if they were put to it."""
        replies = self.held_out.get(candidate.number)
        if replies is None:
            return None
        unpruned = self.held_out[None]
        return Score.of(replies, unpruned, self.aim.quality, candidate.times)

    @property
    def gain(self) -> tuple[float, float, float] | None:
        """Points of the chosen recipe over the best published one, held out, with interval."""
        pair = (self.published, self.chosen)
        if any(c is None or c.number not in self.held_out for c in pair):
            return None
        first, second = (self.held_out[c.number].judged(self.aim.quality) for c in pair if c)
        return difference(first, second)

    def rejected(self) -> list[tuple[str, int]]:
        """(why, how many) of recipes that were not asked, or not to the end; most first."""
        why = [c.why_out for c in self.found.candidates if c.why_out]
        return Counter([*self.found.refused, *why]).most_common()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        asked = self.found.candidates
        return {
            "targets": [str(target) for target in self.aim.targets],
            "minimize": list(self.aim.minimize),
            "quality": self.aim.quality,
            "finished": self.found.finished,
            "questions": {
                "search": len(self.found.unpruned),
                "held_out": len(self.held_out.get(None, ())),
            },
            "chosen": None if self.chosen is None else self.chosen.number,
            "best_published": None if self.published is None else self.published.number,
            "gain_over_published": self.gain,
            "front": [candidate.number for candidate in self.front],
            "adaptive": None if self.adapted is None else self.adapted.to_dict(),
            "unpruned": _shares(self.found.unpruned, self.held_out.get(None), self.aim.quality),
            "candidates": [self._described(candidate) for candidate in asked],
            "refused": [[count, why] for why, count in Counter(self.found.refused).most_common()],
        }

    def _described(self, candidate: Candidate) -> dict[str, Any]:
        held = self.score(candidate)
        return {
            "trial": candidate.number,
            "recipe": describe(candidate.recipe),
            "methods": [method.to_dict() for method in candidate.recipe],
            "published": candidate.published,
            "planned": candidate.planned,
            "search": None if candidate.score is None else candidate.score.to_dict(),
            "held_out": None if held is None else held.to_dict(),
            "why_out": candidate.why_out,
        }


def _asked(
    ask: Callable[[Recipe, Sequence[int]], Replies], recipe: Recipe, numbers: Sequence[int]
) -> dict[str, Any]:
    return ask(recipe, numbers).to_dict()


def _rank(candidate: Candidate, aim: Aim) -> tuple[float, ...]:
    """Sorts finalists that meet all targets, the best first."""
    score = candidate.scored
    costs = [score.metrics[cost] for cost in aim.minimize]
    return (*costs, -score.quality, score.metrics["kl"], candidate.number)


def _shares(search: Replies, held_out: Replies | None, quality: str) -> dict[str, float]:
    """Mean quality of the unpruned model."""
    found = {"search": search, "held_out": held_out}
    return {
        name: sum(replies.judged(quality)) / len(replies)
        for name, replies in found.items()
        if replies
    }
