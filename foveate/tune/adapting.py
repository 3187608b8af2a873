"""Adapting: fit a policy to what recipes of a search have answered, and judge it.

How good a recipe is on a question is fitted by ridge regression on the signals, one for each
recipe; the price of FLOPs is the smallest at which the mean cost keeps to the budget. Strength of
the ridge and price are chosen on predictions for questions that the regression has not seen.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from foveate.errors import InputError
from foveate.methods.uniform import Uniform
from foveate.tune.data import Row, Split
from foveate.tune.ledger import Ledger, recipe_key
from foveate.tune.planning import Recipe
from foveate.tune.policy import Option, Policy, signals, words_in
from foveate.tune.replies import Replies, difference
from foveate.tune.space import describe
from foveate.tune.study import Found

FOLDS = 5
RIDGES = (1e4, 1e3, 1e2, 1e1)
"""Strengths that are tried; of equals the first."""
MOST_WORDS = 24
COMMON = 0.04
"""A word counts as a signal if it is in more than this share of the questions, and not in all."""
Array = npt.NDArray[np.float64]
EVERYTHING: Recipe = (Uniform(keep=1.0),)


@dataclass(frozen=True)
class Known:
    """Recipes to choose from, and how each did on the questions of a search.

    Args:
        recipes: R of them.
        flops: (R) shares of the unpruned model's FLOPs.
        good: (R, Q) how good the answers were.
        quality: what that is, see `Replies.judged`.
    """

    recipes: tuple[Recipe, ...]
    flops: Array
    good: Array
    quality: str

    @classmethod
    def of(cls, found: Found, quality: str) -> Known:
        """Those that answered all questions of a search, whatever its targets, and all tokens."""
        every = [(EVERYTHING, 1.0, found.unpruned.judged(quality))]
        every += [
            (c.recipe, c.scored.metrics["flops"], c.replies.judged(quality))
            for c in found.finalists
        ]
        return cls.front(every, quality)

    @classmethod
    def front(cls, every: Iterable[tuple[Recipe, float, Sequence[float]]], quality: str) -> Known:
        """Of recipes, with cost and answers of each, those that no cheaper one is as good as; all
        tokens stay.
        """
        front, best = [], -math.inf
        for one in sorted(every, key=lambda one: (one[1], -sum(one[2]))):
            if sum(one[2]) > best or one[0] is EVERYTHING:
                front.append(one)
                best = max(best, sum(one[2]))
        recipes, costs, answers = zip(*front, strict=True)
        return cls(recipes, np.array(costs), np.array(answers, dtype=np.float64), quality)

    def fixed(self, budget: float) -> int:
        """The best recipe for all questions within a budget; of equals the cheapest.

        Raises:
            InputError: there is none.
        """
        within = [r for r, flops in enumerate(self.flops) if flops <= budget]
        if not within:
            raise InputError(
                f"no recipe that answered all questions takes {budget:g}x of the FLOPs or less; "
                f"the cheapest takes {self.flops.min():.3f}x"
            )
        return max(within, key=lambda r: (self.good[r].mean(), -self.flops[r]))


@dataclass(frozen=True)
class Sight:
    """What policies see of questions.

    Args:
        rows: all questions of a file.
        hint: put after each.
        max_pixels: most pixels of an image.
    """

    rows: Sequence[Row]
    hint: str = ""
    max_pixels: int | None = None

    def words(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Words that are common in some questions, the most frequent first."""
        counts = Counter(word for n in numbers for word in sorted({*words_in(self._text(n))}))
        found = [w for w, count in counts.items() if COMMON * len(numbers) < count < len(numbers)]
        return tuple(sorted(found, key=lambda word: (-counts[word], word))[:MOST_WORDS])

    def signals(self, numbers: Sequence[int], words: Sequence[str]) -> Array:
        """(Q, S) signals of some questions."""
        found = []
        for number in numbers:
            images: Any = self.rows[number].sample(number, self.max_pixels).images
            found.append(signals(self._text(number), images, words))
        return np.array(found)

    def folds(self, numbers: Sequence[int]) -> npt.NDArray[np.intp]:
        """(Q) the fold of each question; those about one image share one, if there are enough."""
        groups = dict.fromkeys(self.rows[n].images for n in numbers)
        if len(groups) < 2 * FOLDS:
            return np.arange(len(numbers)) % FOLDS
        of = {images: place % FOLDS for place, images in enumerate(groups)}
        return np.array([of[self.rows[n].images] for n in numbers])

    def _text(self, number: int) -> str:
        return f"{self.rows[number].question} {self.hint}".strip()


def fit(
    known: Known, x: Array, words: tuple[str, ...], folds: npt.NDArray[np.intp], budget: float
) -> Policy:
    """The policy whose mean FLOPs keep to a budget.

    Args:
        known: recipes, and how good their answers were.
        x: (Q, S) signals of the same questions.
        words: which of the signals look for.
        folds: (Q) each part is predicted by what was fitted to the others.
        budget: largest mean share of FLOPs, which some recipe keeps to.
    """
    tried = []
    for ridge in RIDGES:
        values = np.empty_like(known.good)  # of questions that were not fitted to
        for inside in (folds == part for part in np.unique(folds)):
            bias, weights = regression(x[~inside], known.good[:, ~inside], ridge)
            values[:, inside] = bias[:, None] + weights @ x[inside].T
        price = price_of(values, known.flops, budget)
        taken = choices(values, known.flops, price)
        tried.append((np.take_along_axis(known.good, taken[None], 0).mean(), price, ridge))
    _, price, ridge = max(tried, key=lambda one: one[0])
    bias, weights = regression(x, known.good, ridge)
    options = tuple(
        Option(recipe, float(flops), float(b), tuple(w.tolist()))
        for recipe, flops, b, w in zip(known.recipes, known.flops, bias, weights, strict=True)
    )
    low, high = (tuple(f(x, axis=0).tolist()) for f in (np.min, np.max))
    return Policy(options, price, words, low, high)


def regression(x: Array, good: Array, ridge: float) -> tuple[Array, Array]:
    """Ridge regression of each recipe on signals of unit variance.

    Args:
        x: (Q, S) signals.
        good: (R, Q).
        ridge: its strength.

    Returns:
        (R) bias and (R, S) weights, for signals as they are.
    """
    mean, scale = x.mean(0), x.std(0)
    scale[scale < 1e-9] = np.inf  # a signal that does not vary says nothing
    unit = (x - mean) / scale
    centred = good - good.mean(1, keepdims=True)
    inner = unit.T @ unit + ridge * np.eye(x.shape[1])
    weights = np.linalg.solve(inner, unit.T @ centred.T).T / scale
    return good.mean(1) - weights @ mean, weights


def choices(values: Array, flops: Array, price: float) -> npt.NDArray[np.intp]:
    """(Q) the recipe of each question, by (R, Q) predictions and (R) costs in ascending order."""
    return (values - price * flops[:, None]).argmax(0)


def price_of(values: Array, flops: Array, budget: float) -> float:
    """The smallest price at which the mean cost of `choices` keeps to a budget."""
    one, two = np.triu_indices(len(flops), 1)
    apart = flops[two] > flops[one]
    one, two = one[apart], two[apart]
    turns = (values[two] - values[one]) / (flops[two] - flops[one])[:, None]
    prices = np.unique(np.concatenate([[0.0], turns[turns > 0]])) * (1 + 1e-9)
    low, high = 0, len(prices) - 1
    while low < high:  # costs fall as prices rise
        middle = (low + high) // 2
        fits = flops[choices(values, flops, prices[middle])].mean() <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return float(prices[low])


@dataclass(frozen=True)
class Adapted:
    """A policy, and how it did on held-out questions beside the best fixed recipe.

    Args:
        policy: fitted on the questions of the search.
        fixed: the best recipe for all of those questions within the same budget.
        chosen: how often each recipe of the policy was chosen, held out.
        good: how good its answers were, held out, question by question.
        fixed_good: the same of the fixed recipe.
        flops: mean shares of the FLOPs, measured, of the policy and of the fixed recipe.
    """

    policy: Policy
    fixed: Recipe
    chosen: tuple[int, ...]
    good: tuple[float, ...]
    fixed_good: tuple[float, ...]
    flops: tuple[float, float]

    @property
    def gain(self) -> tuple[float, float, float]:
        """Points of the policy over the fixed recipe, and their 95 % interval."""
        return difference(self.fixed_good, self.good)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the gain is in points."""
        return {
            "recipes": [describe(option.methods) for option in self.policy.options],
            "chosen": list(self.chosen),
            "fixed": describe(self.fixed),
            "asked": len(self.good),
            "quality": sum(self.good) / len(self.good),
            "fixed_quality": sum(self.fixed_good) / len(self.good),
            "flops": self.flops[0],
            "fixed_flops": self.flops[1],
            "gain_over_fixed": list(self.gain),
        }


def adapt(
    known: Known,
    sight: Sight,
    split: Split,
    budget: float,
    ask: Callable[[Recipe, Sequence[int]], Replies],
    ledger: Ledger,
) -> Adapted:
    """Fit a policy to the questions of a search, and ask held-out ones as it says.

    Args:
        known: recipes, and how they did in the search.
        sight: what is seen of questions.
        split: which questions were searched with, and which are held out.
        budget: largest mean share of FLOPs.
        ask: `Asker.ask`.
        ledger: what was asked before.

    Raises:
        InputError: no recipe takes so little.
    """
    fixed, numbers = known.recipes[known.fixed(budget)], split.held_out
    words = sight.words(split.search)
    x = sight.signals(split.search, words)
    policy = fit(known, x, words, sight.folds(split.search), budget)

    def asked(recipe: Recipe, places: Sequence[int]) -> Replies:
        some = [numbers[place] for place in places]
        key = f"held out {recipe_key(recipe)}"
        if len(some) < len(numbers):
            key += f" of {hashlib.sha256(str(some).encode()).hexdigest()[:16]}"
        return Replies.from_dict(ledger.get(key, lambda: ask(recipe, some).to_dict()))

    picks = [policy.pick(one) for one in sight.signals(numbers, words).tolist()]
    mine, order = Replies(), list[int]()
    for number, option in enumerate(policy.options):
        places = [place for place, pick in enumerate(picks) if pick == number]
        if places:
            mine, order = mine + asked(option.methods, places), order + places
    other = asked(fixed, range(len(numbers)))
    good = dict(zip(order, mine.judged(known.quality), strict=True))
    return Adapted(
        policy, fixed,
        tuple(picks.count(number) for number in range(len(policy.options))),
        tuple(good[place] for place in range(len(numbers))),
        other.judged(known.quality),
        (mine.after[0] / mine.before[0], other.after[0] / other.before[0]),
    )  # fmt: skip
