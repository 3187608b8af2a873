"""Choose a recipe for each question, against the best recipe for all, at equal mean FLOPs.

    python benchmarks/adaptive.py [--each 60] [--first 5000] [--work DIR]

Questions are drawn by FoveaBench, seven of its tasks. Recipes are those that benchmarks/tune.py has
found on other questions, and some of other costs; each is asked every question once. Questions are
parted into folds. For each fold, the best fixed recipe within a share of FLOPs is chosen on the
others, a policy is fitted to them with the cost of that recipe as its mean budget, and both are
judged on the fold. Intervals are percentiles of a bootstrap over questions; policies are not fitted
anew for it. DIR keeps what was asked.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bench import RESULTS, save, warm_heap
from _tune_data import TASKS, draw

warm_heap()

import numpy as np  # noqa: E402

from foveate import tiny  # noqa: E402
from foveate.core.resolve import methods_of  # noqa: E402
from foveate.tune.adapting import EVERYTHING, Array, Known, Sight, adapt  # noqa: E402
from foveate.tune.asking import Asker  # noqa: E402
from foveate.tune.data import Split, read_rows  # noqa: E402
from foveate.tune.ledger import Ledger, recipe_key  # noqa: E402
from foveate.tune.planning import Recipe  # noqa: E402
from foveate.tune.replies import Replies  # noqa: E402
from foveate.tune.space import describe  # noqa: E402

SHARES = (0.25, 0.43, 0.62)
MORE = (("cls-drop", 0.4), ("cls-drop", 0.6), ("fastv", 0.25), ("divprune", 0.125))
FOLDS, SEED, DRAWS = 4, 0, 10_000


class NoWords(Sight):
    """Sees images and lengths, and no words."""

    def words(self, numbers: Sequence[int]) -> tuple[str, ...]:
        return ()


@dataclass
class Answers:
    """What was said to all questions.

    Args:
        replies: by `recipe_key`.
        recipes: by the same.
        cpu_seconds: that asking took.
    """

    replies: dict[str, Replies]
    recipes: dict[str, Recipe]
    cpu_seconds: float

    def known(self, numbers: Sequence[int]) -> Known:
        """Recipes with their mean costs, and how they did on some questions."""
        every = []
        for key, recipe in self.recipes.items():
            whole = self.replies[key]
            good = [float(whole.right[n]) for n in numbers]
            every.append((recipe, whole.after[0] / whole.before[0], good))
        return Known.front(every, "accuracy")

    def ask(self, recipe: Recipe, numbers: Sequence[int]) -> Replies:
        """Replies to some questions, at the recipe's mean cost."""
        whole = self.replies[recipe_key(recipe)]
        right, agrees = (tuple(one[n] for n in numbers) for one in (whole.right, whole.agrees))
        count, part = len(numbers), len(numbers) / len(whole)
        before, after = ((part * f, part * kv) for f, kv in (whole.before, whole.after))
        return Replies(right, agrees, (0.0,) * count, (), before, after)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=60, help="questions of a task")
    parser.add_argument("--first", type=int, default=5000, help="seed of the first of them")
    parser.add_argument("--work", type=Path, default=Path("adaptive-work"))
    arguments = parser.parse_args()
    rows = read_rows(draw(arguments.work / "data", arguments.each, arguments.first))
    rules = {"each": arguments.each, "first": arguments.first}
    ledger = Ledger(arguments.work / "asked.jsonl", rules)
    answers = ask_all(Asker(*tiny.load(), rows, batch=16, max_new_tokens=4), len(rows), ledger)
    whole = answers.known(range(len(rows)))
    save("adaptive", {
        "model": "tiny", "tasks": TASKS, **rules, "questions": len(rows), "folds": FOLDS,
        "seed": SEED, "draws": DRAWS,
        "note": "the machine was shared with other work; CPU seconds of asking, one thread",
        "cpu_seconds": round(answers.cpu_seconds, 1),
        "recipes": [
            {"recipe": describe(recipe), "flops": float(flops), "right": float(good.mean())}
            for recipe, flops, good in zip(whole.recipes, whole.flops, whole.good, strict=True)
        ],
        "shares": [compared(share, answers, rows) for share in SHARES],
    })  # fmt: skip


def ask_all(asker: Asker, count: int, ledger: Ledger) -> Answers:
    """Ask every recipe every question."""
    tuned = json.loads((RESULTS / "tune.json").read_text())["shares"]
    found = [tuned[0]["chosen"], tuned[0]["others"][-1], tuned[1]["chosen"]]
    recipes = [methods_of(one["methods"]) for one in found]
    recipes += [methods_of(name, keep=keep) for name, keep in MORE]
    said, seconds = {}, 0.0
    for recipe in [EVERYTHING, *recipes]:
        methods = () if recipe is EVERYTHING else recipe
        key = recipe_key(recipe)
        value = ledger.get(key, functools.partial(asked, asker, methods, count))
        said[key], seconds = Replies.from_dict(value), seconds + value["cpu_seconds"]
        print(describe(recipe), sum(said[key].right) / count)
    return Answers(said, {recipe_key(recipe): recipe for recipe in [EVERYTHING, *recipes]}, seconds)


def asked(asker: Asker, recipe: Recipe, count: int) -> dict[str, Any]:
    """Replies to all questions, and the CPU seconds that they took."""
    began = time.process_time()
    said = asker.ask(recipe, range(count)).to_dict()
    return {**said, "cpu_seconds": round(time.process_time() - began, 1)}


def compared(share: float, answers: Answers, rows: Sequence[Any]) -> dict[str, Any]:
    """Policies beside fixed recipes and beside mixtures, all on questions that they never saw."""
    order = np.random.default_rng(SEED).permutation(len(rows))
    good: dict[str, list[Array]] = {name: [] for name in ("policy", "no_words", "fixed", "mixed")}
    flops: dict[str, list[float]] = {name: [] for name in ("policy", "no_words", "fixed")}
    fixed, chosen = list[str](), dict[str, int]()
    for fold in range(FOLDS):
        inside = np.arange(len(rows)) % FOLDS == fold
        split = Split(tuple(order[~inside].tolist()), tuple(order[inside].tolist()))
        known = answers.known(split.search)
        budget = float(known.flops[known.fixed(share)])
        for name, sight in (("policy", Sight(rows)), ("no_words", NoWords(rows))):
            found = adapt(known, sight, split, budget, answers.ask, Ledger(None, {}))
            good[name].append(np.array(found.good, float))
            flops[name] += [found.flops[0]] * len(found.good)
            if name == "policy":
                good["fixed"].append(np.array(found.fixed_good, float))
                good["mixed"].append(mixture(known, found.flops[0], answers, split.held_out))
                flops["fixed"] += [found.flops[1]] * len(found.good)
                fixed.append(describe(found.fixed))
                for option, count in zip(found.policy.options, found.chosen, strict=True):
                    text = describe(option.methods)
                    chosen[text] = chosen.get(text, 0) + count
    joined = {name: np.concatenate(parts) for name, parts in good.items()}
    pairs = [("policy", "fixed"), ("policy", "mixed"), ("no_words", "fixed")]
    return {
        "share": share,
        "fixed": fixed,
        "chosen": chosen,
        "right": {name: float(values.mean()) for name, values in joined.items()},
        "flops": {name: float(np.mean(values)) for name, values in flops.items()},
        "gains": {f"{a} over {b}": bootstrap(joined[a] - joined[b]) for a, b in pairs},
    }


def mixture(known: Known, flops: float, answers: Answers, numbers: Sequence[int]) -> Array:
    """Mean answers, question by question, of the best two recipes that are given to questions by
    chance, at a mean cost. Which two, the questions of the fit say.
    """
    quality, costs = known.good.mean(1), known.flops
    best = (-1.0, 0, 0, 1.0)
    for one in range(len(costs)):
        for two in range(len(costs)):
            if costs[one] <= flops < costs[two]:
                part = float((costs[two] - flops) / (costs[two] - costs[one]))
                best = max(best, (part * quality[one] + (1 - part) * quality[two], one, two, part))
    _, one, two, part = best
    first, second = (
        np.array(answers.ask(known.recipes[n], numbers).right, float) for n in (one, two)
    )
    mixed: Array = part * first + (1 - part) * second
    return mixed


def bootstrap(gains: Array) -> list[float]:
    """Mean in points, and the 2.5 and 97.5 percentiles of means of questions drawn anew."""
    drawn = np.random.default_rng(SEED).integers(0, len(gains), (DRAWS, len(gains)))
    low, high = np.percentile(gains[drawn].mean(1), (2.5, 97.5))
    return [100 * float(value) for value in (gains.mean(), low, high)]


if __name__ == "__main__":
    main()
