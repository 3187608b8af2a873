"""A planted world: what recipes are worth is known, and no model runs."""

import random

import pytest

from foveate import tiny
from foveate.families import find_family
from foveate.tune.ledger import Ledger
from foveate.tune.replies import Replies
from foveate.tune.space import Space
from foveate.tune.study import Plan, Study
from foveate.tune.targets import Aim
from foveate.tune.verdict import Verdict


class PlainAccount:
    """Costs grow in a straight line with the share of tokens that is left at the end."""

    def __init__(self, family):
        self.family, self.tokens = family, 256

    def shares(self, recipe):
        left = 1.0
        for method in recipe:
            method.steps(self.family)
            keep = method.keep
            if keep is None:
                left *= 1 - sum(method.r) / self.tokens
            else:
                left *= keep[-1] if isinstance(keep, tuple) else keep
        return {"flops": 0.05 + 0.95 * left, "kv": left}


QUESTIONS = tuple(range(1000, 1120))
HELD_OUT = tuple(range(5000, 5040))


class Planted:
    """Answers as a rule says; its calls are kept.

    Args:
        rule: of a recipe makes the share of right answers.
        planner: says what a recipe costs.
        killed_at: the call at which the process dies, or `None`.
        dearer: how many times more than planned a recipe costs.
    """

    def __init__(self, rule, planner, killed_at=None, dearer=1.0):
        self.dearer, self.rule, self.planner, self.killed_at = dearer, rule, planner, killed_at
        self.calls = []

    def ask(self, recipe, numbers):
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append((recipe, tuple(numbers)))
        share = self.rule(recipe) if recipe else 0.95
        right = tuple(random.Random(n).random() < share for n in numbers)
        costs = self.planner.shares(recipe) if recipe else {"flops": 1.0, "kv": 1.0}
        more = self.dearer if recipe else 1
        after = (round(1e6 * more * costs["flops"]), round(1e6 * more * costs["kv"]))
        count = len(numbers)
        return Replies(right, right, (1 - share,) * count, (), (10**6,) * 2, after)


@pytest.fixture(scope="session")
def planner():
    return PlainAccount(find_family(tiny.load()[0]))


@pytest.fixture(scope="session")
def tune(planner):
    """Search and judge in a planted world; returns the verdict and what was asked."""

    def run(rule, path=None, *, targets=("flops<=0.25x",), minimize=(), methods=("cls-drop",),
            trials=30, seed=0, killed_at=None, dearer=1.0,
            late=lambda: False):  # fmt: skip
        aim = Aim.of(targets, minimize, answered=True)
        asker = Planted(rule, planner, killed_at, dearer)
        limits = {c: b for c in ("flops", "kv") if (b := aim.bound(c)) is not None}
        space = Space(planner, methods, limits)
        ledger = Ledger(path, {"seed": seed})
        plan = Plan(trials, population=8, first=12, seed=seed)
        study = Study(aim, plan, space, planner, asker, QUESTIONS, ledger, late=late)
        verdict = Verdict.of(study.run(), aim)
        searched = len(asker.calls)
        verdict.judge(asker.ask, HELD_OUT, ledger, lambda: None)
        return verdict, asker.calls, searched

    return run
