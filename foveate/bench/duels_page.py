"""Who really beats whom, as a part of a report and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from foveate.bench.duels import LEVEL, Duel, budgets, chance, counted, duels, ranking
from foveate.bench.levels import ALL
from foveate.bench.summary import Config, Summary
from foveate.io.html import table

TERMS = {
    "really beats": f"The adjusted p is below {LEVEL:g}: chance alone hardly explains the "
    "difference. Two that are not told apart need not be equal; more questions may tell.",
    "difference": "Share of right answers of the first less that of the second, in points, on the "
    "questions that both were asked, with its 95 % interval (normal approximation, not adjusted "
    "for the number of pairs).",
    "won": "Questions that only the first answered correctly.",
    "lost": "Questions that only the second answered correctly. Where the two agree, an answer "
    "says nothing about which is better.",
    "adjusted p": "Probability of at least such a difference if the two were equally good: exact "
    "two-sided test of McNemar, with Holm's correction for all pairs of the budget. With it, a "
    f"budget whose methods are equally good shows any real difference with a probability of "
    f"{LEVEL:g} at most. Questions count as independent.",
}
NOTE = (
    "Every two methods on the questions that both were asked. Each figure is the row's accuracy "
    "less the column's, in points: bold and coloured where the difference is real, faint where "
    "chance may explain it."
)


def body(summary: Summary) -> str:
    """HTML of all budgets."""
    parts = "".join(_budget(summary, keep) for keep in budgets(summary))
    return f'<p class="faint">{NOTE}</p>{parts}' if parts else "<p>Nothing can be compared.</p>"


def _budget(summary: Summary, keep: float | None) -> str:
    found, order = duels(summary, keep), ranking(summary, keep)
    title = "Budgets that methods choose themselves" if keep is None else f"keep = {keep:g}"
    return (
        f"<h3>{title}</h3><p>{escape(counted(found))}</p>{_matrix(found, order)}"
        f"<details><summary>All {len(found)} pairs in figures</summary>{_list(found)}</details>"
    )


Grid = dict[tuple[Config, Config], tuple[Duel, int]]
"""Pairs both ways, with -1 where the row is the second."""


def _grid(found: Sequence[Duel]) -> Grid:
    there = {(duel.first, duel.second): (duel, 1) for duel in found}
    return there | {(duel.second, duel.first): (duel, -1) for duel in found}


def _points(duel: Duel, sign: int) -> str:
    """The row's accuracy less the column's, in whole points."""
    if duel.p is None:
        return "-"
    points = round(100 * sign * duel.paired.difference)
    return f"{points:+d}" if points else "0"


def _matrix(found: Sequence[Duel], order: Sequence[Config]) -> str:
    grid, heads = _grid(found), _heads(order)
    rows = []
    for number, row in enumerate(order, 1):
        cells = ["<td></td>" if row == other else _cell(*grid[row, other]) for other in order]
        rows.append(f"<tr><td>{number} {escape(name_of(row))}</td>{''.join(cells)}</tr>")
    return f'<div class="dense">{table(["method", *heads], rows, heads)}</div>'


def _heads(order: Sequence[Config]) -> dict[str, str]:
    return {str(number): name_of(config) for number, config in enumerate(order, 1)}


def _cell(duel: Duel, sign: int) -> str:
    if duel.p is None:
        return '<td class="faint" title="no question in common">-</td>'
    kind, text = "faint", _points(duel, sign)
    if duel.real:
        kind, text = "good" if sign > 0 else "bad", f"<b>{text}</b>"
    tip = f"{name_of(duel.first)} against {name_of(duel.second)}: {_figures(duel)}"
    return f'<td class="{kind}" title="{escape(tip)}">{text}</td>'


def markdown(found: Sequence[Duel], order: Sequence[Config]) -> str:
    """The matrix in Markdown; what is real is bold.

    Args:
        found: all pairs of a budget.
        order: its methods, see `ranking`.
    """
    grid = _grid(found)
    rows = [["method", *_heads(order)], ["---", *["---:"] * len(order)]]
    for number, row in enumerate(order, 1):
        cells = [f"{number} {name_of(row)}"]
        for other in order:
            duel, sign = grid.get((row, other), (None, 0))
            text = "" if duel is None else _points(duel, sign)
            cells.append(f"**{text}**" if duel is not None and duel.real else text)
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def _figures(duel: Duel) -> str:
    p = chance(duel.p)
    return f"{difference(duel)}, adjusted p {p if p.startswith('<') else f'= {p}'}"


def difference(duel: Duel) -> str:
    """In points, with its interval; `-` with nothing in common."""
    pair = duel.paired
    if duel.p is None:
        return "-"
    return f"{100 * pair.difference:+.1f} ± {100 * pair.half_width:.1f}"


def _list(found: Sequence[Duel]) -> str:
    head = ["pair", "difference, points", "adjusted p", "won", "lost", "n"]
    rows = []
    for duel in sorted(found, key=lambda x: (x.p is None, not x.real)):
        word = "really beats" if duel.real else "against"
        names = f"{escape(name_of(duel.first))} {word} {escape(name_of(duel.second))}"
        pair = duel.paired
        figures = [difference(duel), chance(duel.p), pair.won, pair.lost, pair.asked]
        cells = "".join(f"<td>{escape(str(figure))}</td>" for figure in figures)
        rows.append(f"<tr><td>{names}</td>{cells}</tr>")
    return table(head, rows, TERMS)


def name_of(config: Config) -> str:
    """A method's name as readers see it."""
    return "all tokens" if config[0] == ALL else config[0]
