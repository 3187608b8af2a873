"""Who really beats whom: every two methods of a budget on the questions that both were asked.

A difference is called real where an exact test of McNemar finds it improbable by chance even after
Holm's correction for the number of pairs that were looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from foveate.bench.levels import ALL
from foveate.bench.stats import Paired, holm
from foveate.bench.summary import Config, Summary

LEVEL = 0.05
"""An adjusted probability below this one is called real."""


@dataclass(frozen=True)
class Duel:
    """Two methods at a budget.

    Args:
        first: the one with more right answers, or the higher one in the ranking.
        second: the other.
        paired: from `second` to `first`, so that `won` are the questions that only `first` answers.
        p: adjusted probability of such a difference by chance; `None` with nothing in common.
    """

    first: Config
    second: Config
    paired: Paired
    p: float | None

    @property
    def real(self) -> bool:
        """Whether `first` is better beyond chance."""
        return self.p is not None and self.p < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """JSON values; differences are shares, not points."""
        return {
            "first": self.first[0], "second": self.second[0], "asked": self.paired.asked,
            "won": self.paired.won, "lost": self.paired.lost,
            "difference": self.paired.difference, "half_width": self.paired.half_width,
            "p": self.paired.p, "p_adjusted": self.p, "real": self.real,
        }  # fmt: skip


def budgets(summary: Summary) -> list[float | None]:
    """Those at which there is something to compare, largest first; `None` for methods' own."""
    used = {keep for name, keep in summary.configs if name != ALL}
    return [keep for keep in (*summary.keeps, None) if keep in used]


def ranking(
    summary: Summary, keep: float | None, tasks: Sequence[str] | None = None
) -> list[Config]:
    """The methods of a budget and all tokens, the most accurate first."""
    lines = [
        summary.line(config, tasks)
        for config in summary.configs
        if config[0] == ALL or config[1] == keep
    ]
    ranked = sorted((x for x in lines if x.n), key=lambda x: (-x.accuracy, x.config[0]))
    return [line.config for line in ranked]


def duels(summary: Summary, keep: float | None, tasks: Sequence[str] | None = None) -> list[Duel]:
    """Every two methods of a budget, all tokens among them.

    Args:
        summary: of the cells.
        keep: the budget; `None` for methods that choose their own.
        tasks: of which questions count; by default the informative ones.

    Returns:
        Pairs in the order of the ranking. Probabilities are adjusted for all of the budget.
    """
    found = []
    for first, second in combinations(ranking(summary, keep, tasks), 2):
        pair = summary.paired(second, first, tasks)
        if pair.lost > pair.won:  # where the two were asked different questions besides
            first, second, pair = second, first, Paired(pair.asked, pair.won, pair.lost)
        found.append((first, second, pair))
    adjusted = iter(holm([pair.p for *_, pair in found if pair.asked]))
    return [Duel(*each, next(adjusted) if each[2].asked else None) for each in found]


def counted(found: Sequence[Duel]) -> str:
    """How many of some pairs really differ, as a sentence."""
    real, known = sum(duel.real for duel in found), sum(duel.p is not None for duel in found)
    return f"{real} of {known} pairs really differ (adjusted p < {LEVEL:g})."


def chance(p: float | None) -> str:
    """A probability in three digits, `< 0.001` where it is less, `-` where there is none."""
    if p is None:
        return "-"
    if p < 1e-3:
        return "< 0.001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.3f}"
