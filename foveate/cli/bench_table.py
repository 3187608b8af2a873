"""The end of `foveate bench`: a table of accuracy and costs, and what was refused."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.bench.duels import budgets, counted, duels, ranking
from foveate.bench.duels_page import markdown
from foveate.bench.levels import ALL
from foveate.bench.summary import Line, Summary
from foveate.bench.svg import percent
from foveate.cli.listing import plain_table
from foveate.errors import InputError
from foveate.io.quoting import quoted, shown
from foveate.io.writing import check_file, write_json, write_text

HEADINGS = ("method", "keep", "accuracy, %", "95 % interval", "FLOPs, %", "KV, %", "TTFT, %")
SUFFIXES = (".md", ".csv", ".json")
MATRIX = (
    "The row's accuracy less the column's, in points; bold where it is more than chance: exact "
    "test of McNemar with Holm's correction for all pairs."
)
_OFFER = re.compile(r"\. (Methods that work here: |No method works here).*", re.DOTALL)


def lines_of(summary: Summary) -> list[Line]:
    """All tokens first, then budgets from the largest, in each the most accurate first."""
    lines = [summary.line(config) for config in summary.configs]
    lines = [line for line in lines if line.n]
    return sorted(
        lines, key=lambda x: (x.config[0] != ALL, -(x.config[1] or 0.0), -x.accuracy, x.config[0])
    )


def cells_of(line: Line) -> tuple[str, ...]:
    """What stands under `HEADINGS`."""
    name, keep = line.config
    return (
        "all tokens" if name == ALL else name,
        "" if name == ALL else "own" if keep is None else f"{keep:g}",
        percent(line.accuracy),
        f"{percent(line.interval[0])} to {percent(line.interval[1])}",
        percent(line.flops),
        percent(line.kv_bytes),
        percent(1.0 if name == ALL else line.ttft),
    )


def show_table(summary: Summary, console: Console) -> None:
    """Print the table, and under it what its figures are of."""
    lines = lines_of(summary)
    if not lines:
        return
    console.print(result_table(lines))
    telling = [task.name for task in summary.tasks if task.telling]
    silent = [task.name for task in summary.tasks if not task.telling]
    text = f"accuracy over {_counted(len(telling or silent), 'task')}, {lines[0].n} questions"
    if silent and telling:
        text += f"; without {', '.join(silent)}, which the model cannot do even with all tokens"
    elif silent:
        text += "; on none of them is the model better than the most common answer"
    console.print(f"[dim]{escape(text)}; costs in % of all tokens[/]")


def result_table(lines: Sequence[Line]) -> Table:
    """The table for a terminal; narrow ones see fewer costs, not broken rows."""
    table = plain_table(*HEADINGS)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in lines:
        cells = [escape(cell) for cell in cells_of(line)]
        table.add_row(*cells, style="bold" if line.config[0] == ALL else None)
    return table


def show_refusals(summary: Summary, console: Console) -> None:
    """Print one line for each reason why cells were refused or failed."""
    kinds: dict[tuple[str, str, bool], tuple[dict[str, None], int]] = {}
    for method, status, reason, cells in summary.troubles():
        why, of_method = re.subn(rf"^'?{re.escape(method)}'? ", "", reason)
        kind = (status, _OFFER.sub("", why), bool(of_method))
        names, count = kinds.get(kind, ({}, 0))
        kinds[kind] = ({**names, method: None}, count + len(cells))
    for (status, why, of_method), (names, count) in kinds.items():
        why = f"each {why}" if of_method and len(names) > 1 else why
        colour = "red" if status == "failed" else "yellow"
        told = f"{_counted(count, 'cell')}, {shown(', '.join(names), 60)}: {shown(why, 160)}"
        console.print(f"[{colour}]{status}[/] {escape(told)}", soft_wrap=True)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def check_table(path: Path | None) -> None:
    """Refuse a table file that can be written in no format.

    Raises:
        InputError: its name ends in none of `SUFFIXES`, or it cannot be written.
    """
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"--table takes a file that ends in .md, .csv or .json, got {quoted(str(path))}"
        )
    check_file(path)


def write_table(path: Path, summary: Summary) -> None:
    """Write the table by the ending of the file; Markdown and JSON say too who beats whom."""
    lines = lines_of(summary)
    rows = [HEADINGS, *(cells_of(line) for line in lines)]
    kind = path.suffix.lower()
    if kind == ".json":
        return write_json(path, to_json(lines, summary), indent=1)
    if kind == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return write_text(path, text.getvalue())
    marked = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|---|" + "---:|" * (len(HEADINGS) - 1)
    text_ = "\n".join([marked[0], rule, *marked[1:]]) + "\n"
    return write_text(path, text_ + "".join(_matrices(summary)))


def _matrices(summary: Summary) -> Iterator[str]:
    """Who really beats whom in Markdown, budget by budget."""
    for keep in budgets(summary):
        found = duels(summary, keep)
        title = "own budgets" if keep is None else f"keep = {keep:g}"
        yield f"\n## Who really beats whom, {title}\n\n{MATRIX} {counted(found)}\n\n"
        yield markdown(found, ranking(summary, keep))


def to_json(lines: Sequence[Line], summary: Summary) -> dict[str, Any]:
    """The table and all pairs as JSON values; shares and differences are fractions."""
    names = ("n", "accuracy", "interval", "agreement", "kl", "recall", "hit", "tokens", "flops",
             "kv_bytes", "ttft")  # fmt: skip
    return {
        "lines": [
            {"method": line.config[0], "keep": line.config[1]}
            | {name: getattr(line, name) for name in names}
            for line in lines
        ],
        "pairs": [
            {"keep": keep, **duel.to_dict()}
            for keep in budgets(summary)
            for duel in duels(summary, keep)
        ],
    }
