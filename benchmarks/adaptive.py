"""Choose a recipe for each question, against the best recipe for all, at equal mean FLOPs.

    python benchmarks/adaptive.py [--each 110] [--trials 13] [--work DIR]

Questions are drawn by FoveaBench, seven of its tasks, with seeds that no other benchmark draws. A
search finds recipes of many costs. At each share of FLOPs the best recipe of the search within it
is the fixed one; a policy is fitted to the same questions with the cost of that recipe as its mean
budget. Every recipe is asked all held-out questions once; answers of a policy are those of the
recipes that it chooses, and its FLOPs the mean of theirs. Intervals are percentiles of a bootstrap
over held-out questions; the search and the fit are not drawn anew. DIR keeps what was asked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bench import save, warm_heap
from _tune_data import TASKS, draw

warm_heap()

import numpy as np  # noqa: E402

from foveate import tiny  # noqa: E402
from foveate.tune.adapting import EVERYTHING, Adapted, Known, Sight, adapt  # noqa: E402
from foveate.tune.asking import Asker  # noqa: E402
from foveate.tune.job import Options, Tuning  # noqa: E402
from foveate.tune.ledger import Ledger, recipe_key  # noqa: E402
from foveate.tune.planning import Recipe  # noqa: E402
from foveate.tune.replies import Replies  # noqa: E402
from foveate.tune.space import describe  # noqa: E402
from foveate.tune.study import Plan  # noqa: E402

SHARES = (0.25, 0.4)
METHODS = ("cls-drop", "holitom-inner", "transprune", "fastv", "divprune")
SEED, FIRST = 0, 20_000
DRAWS = 10_000


class NoWords(Sight):
    """Sees images and lengths, and no words."""

    def words(self, numbers: Sequence[int]) -> tuple[str, ...]:
        return ()


@dataclass
class HeldOut:
    """Answers of every recipe to all held-out questions.

    Args:
        asker: asks them.
        numbers: of the questions.
        known: replies to all of them, by `recipe_key`.
    """

    asker: Asker
    numbers: tuple[int, ...]
    known: dict[str, Replies]

    def of(self, recipe: Recipe) -> Replies:
        """Of one recipe."""
        key = recipe_key(recipe)
        if key not in self.known:
            self.known[key] = self.asker.ask(recipe, self.numbers)
        return self.known[key]

    def ask(self, recipe: Recipe, numbers: Sequence[int]) -> Replies:
        """Replies to some of them, at the recipe's mean cost."""
        whole, places = self.of(recipe), [self.numbers.index(n) for n in numbers]
        right, agrees = (tuple(one[p] for p in places) for one in (whole.right, whole.agrees))
        part = len(places) / len(self.numbers)
        before, after = ((part * f, part * kv) for f, kv in (whole.before, whole.after))
        return Replies(right, agrees, (0.0,) * len(places), (), before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=110, help="questions of a task")
    parser.add_argument("--trials", type=int, default=13)
    parser.add_argument("--work", type=Path, default=Path("adaptive-work"))
    arguments = parser.parse_args()
    data = draw(arguments.work / "data", arguments.each, FIRST)
    model, processor = tiny.load()
    options = Options(
        targets=("accuracy>=-70", "flops<=0.75x"), minimize=("flops",), methods=METHODS,
        held_out=0.6, max_new_tokens=4, plan=Plan(arguments.trials, first=96, seed=SEED),
    )  # fmt: skip
    job = Tuning("tiny", data, arguments.work / "search", options)
    asker = Asker(model, processor, job.rows, batch=16, max_new_tokens=4)
    began = time.process_time()
    verdict = job.run(model, processor, lambda found: print(len(found.candidates)), asker=asker)
    known, sight = Known.of(verdict.found, "accuracy"), Sight(job.rows)
    judged = {recipe_key(c.recipe): verdict.held_out[c.number] for c in verdict.to_judge}
    judged[recipe_key(EVERYTHING)] = verdict.held_out[None]
    held = HeldOut(asker, job.split.held_out, judged)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        budget = float(known.flops[known.fixed(share)])
        adapted = adapt(known, sight, job.split, budget, held.ask, Ledger(None, {}))
        blind = adapt(known, NoWords(job.rows), job.split, budget, held.ask, Ledger(None, {}))
        rows.append(row(share, known, adapted, blind, held))
        print(rows[-1])
    save("adaptive", {
        "model": "tiny", "tasks": TASKS, "each": arguments.each, "first": FIRST,
        "trials": arguments.trials, "seed": SEED, "methods": METHODS, "draws": DRAWS,
        "questions": {"search": len(job.split.search), "held_out": len(job.split.held_out)},
        "note": "the machine was shared with other work; CPU seconds of this process, one thread",
        "cpu_seconds": round(time.process_time() - began, 1),
        "recipes": [
            {"recipe": describe(recipe), "flops": float(flops), "search": float(good.mean()),
             "held_out": float(np.mean(held.of(recipe).right))}
            for recipe, flops, good in zip(known.recipes, known.flops, known.good, strict=True)
        ],
        "words": adapted.policy.words, "shares": rows,
    })  # fmt: skip


def row(
    share: float, known: Known, adapted: Adapted, blind: Adapted, held: HeldOut
) -> dict[str, Any]:
    """What a page needs of a share: the policy beside the fixed recipe and beside mixtures."""
    mine, fixed = np.array(adapted.good, float), np.array(adapted.fixed_good, float)
    mixed = mixture(known, adapted.flops[0], held)
    no_words = np.array(blind.good, float)
    found = adapted.to_dict()
    del found["gain_over_fixed"], found["recipes"]
    return {
        "share": share,
        **found,
        "over_fixed": bootstrap(mine - fixed),
        "mixed_quality": float(mixed.mean()),
        "over_mixed": bootstrap(mine - mixed),
        "no_words": {
            "quality": float(no_words.mean()), "flops": blind.flops[0],
            "over_fixed": bootstrap(no_words - fixed),
        },
    }  # fmt: skip


def mixture(known: Known, flops: float, held: HeldOut) -> np.ndarray:
    """Mean held-out answers, question by question, of the best two recipes that are given to
    questions by chance, at a mean cost. Which two, the questions of the search say.
    """
    quality = known.good.mean(1)
    best = (-1.0, 0, 0, 1.0)
    for one in range(len(quality)):
        for two in range(len(quality)):
            if known.flops[one] <= flops < known.flops[two]:
                part = (known.flops[two] - flops) / (known.flops[two] - known.flops[one])
                mean = part * quality[one] + (1 - part) * quality[two]
                best = max(best, (mean, one, two, part))
    _, one, two, part = best
    first, second = (np.array(held.of(known.recipes[n]).right, float) for n in (one, two))
    return part * first + (1 - part) * second


def bootstrap(gains: np.ndarray) -> list[float]:
    """Mean in points, and the 2.5 and 97.5 percentiles of means of questions drawn anew."""
    drawn = np.random.default_rng(SEED).integers(0, len(gains), (DRAWS, len(gains)))
    low, high = np.percentile(gains[drawn].mean(1), (2.5, 97.5))
    return [100 * float(value) for value in (gains.mean(), low, high)]


if __name__ == "__main__":
    main()
