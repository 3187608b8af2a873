"""The section of docs/results.md on the headline cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.bench.duels import Duel, chance, counted
from foveate.bench.duels_page import difference, markdown
from foveate.bench.levels import ALL
from foveate.bench.stats import Paired
from foveate.bench.svg import percent

RESULT = Path(__file__).parent / "results" / "headline.json"
INTRO = """## Who really beats whom

The methods that papers compare with most, and the baselines, on {n:,} questions: {each} of each
informative [task](#tasks), those of `multi-turn` {twice}, two about each image. Made by
`benchmarks/headline.py` from `benchmarks/results/headline.json`; {machine}, {threads} thread,
{dtype}, torch {torch}, transformers {transformers}.

- Every two are compared on the same questions by an exact test of McNemar. Probabilities are
  adjusted for all pairs of a budget by Holm's method, so that a budget whose methods are equally
  good shows any real difference with a probability of 5 % at most. Questions count as independent.
- In the matrix, a figure is the row's accuracy less the column's, in points. It is bold where the
  adjusted probability is below 0.05: there the one *really beats* the other.
- Two that are not told apart need not be equally good. Intervals of differences are not adjusted.
"""
LESSONS = """What this says of the tiny model:

- At both budgets, no method is as good as all tokens.
- `pyramiddrop`, `cdpruner`, `visionzip`, `divprune`, `sparsevlm` and `llava-prumerge` really beat
  all three baselines at both budgets. `dart` really loses to `random` and `uniform`. `fastv` is not
  told apart from `random` at a quarter, nor from `uniform` at an eighth.
- At a quarter, nothing tells the first four methods apart. At an eighth, `pyramiddrop` and
  `cdpruner` really beat all other methods. `pyramiddrop` cuts later and needs 1.4 times the FLOPs
  of `cdpruner`, so compare costs too.
"""
Table = Sequence[Sequence[str]]


def load() -> dict[str, Any]:
    """The committed result."""
    return json.loads(RESULT.read_text())


def section(result: dict[str, Any]) -> str:
    """The section as Markdown."""
    n, versions = result["lines"][0]["n"], json.loads(result["versions"])
    counts = {task["name"]: task["n"] for task in result["tasks"]}
    each, twice = min(counts.values()), counts["multi-turn"]
    parts = [INTRO.format(n=n, each=each, twice=twice, **{**versions, **result})]
    for keep in sorted({pair["keep"] for pair in result["pairs"]}, reverse=True):
        parts.append(f"### At keep = {keep:g}, {n:,} questions\n")
        parts.append(budget(result, keep))
    parts.append(LESSONS)
    return "\n".join(parts)


def budget(result: dict[str, Any], keep: float) -> str:
    """Accuracies, matrix and doubtful pairs of a budget."""
    lines = [x for x in result["lines"] if x["method"] == ALL or x["keep"] == keep]
    lines.sort(key=lambda x: (-x["accuracy"], x["method"]))
    found = [duel(pair) for pair in result["pairs"] if pair["keep"] == keep]
    order = [(x["method"], None) for x in lines]
    return "\n".join([_accuracies(lines), markdown(found, order), told_apart(found)])


def duel(pair: dict[str, Any]) -> Duel:
    """A pair of the result as the benchmark has it."""
    paired = Paired(pair["asked"], pair["lost"], pair["won"])
    return Duel((pair["first"], None), (pair["second"], None), paired, pair["p_adjusted"])


def told_apart(found: Sequence[Duel]) -> str:
    """How many pairs really differ, and which do not."""
    doubtful = [x for x in found if not x.real]
    if not doubtful:
        return f"{counted(found)}\n"
    rows = [["not told apart", "difference", "adjusted p", "only first right", "only second right"],
            ["---", *["---:"] * 4]]  # fmt: skip
    for x in doubtful:
        names = " and ".join(_name(config[0]) for config in (x.first, x.second))
        rows.append(
            [names, difference(x), chance(x.p), str(x.paired.won), str(x.paired.lost)]
        )  # fmt: skip
    return f"{counted(found)} These do not:\n\n{_table(rows)}"


def _accuracies(lines: Sequence[dict[str, Any]]) -> str:
    rows = [["method", "accuracy", "change", "tokens", "FLOPs"], ["---", *["---:"] * 4]]
    for number, x in enumerate(lines, 1):
        low, high = x["interval"]
        rows.append([
            f"{number} {_name(x['method'])}",
            f"{percent(x['accuracy'])} ({percent(low)} to {percent(high)})",
            f"{100 * x['change']:+.1f} ± {100 * x['half_width']:.1f}",
            percent(x["tokens"]), percent(x["flops"]),
        ])  # fmt: skip
    return _table(rows)


def _name(method: str) -> str:
    return "all tokens" if method == ALL else f"`{method}`"


def _table(rows: Table) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
