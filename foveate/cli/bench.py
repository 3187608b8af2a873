"""`foveate bench`: how well methods keep what matters, measured on tasks with known evidence."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from foveate.bench import campaign
from foveate.bench.levels import ALL
from foveate.bench.runner import Runner
from foveate.bench.sample import Split
from foveate.bench.settings import Cell, Settings
from foveate.bench.store import Row, Store
from foveate.bench.summary import Summary
from foveate.cli.bench_table import check_table, show_refusals, show_table, write_table
from foveate.cli.console import stderr, stdout
from foveate.cli.interrupts import AGAIN, keeping
from foveate.core import get_method, list_methods
from foveate.errors import BenchError, BudgetError, InputError
from foveate.io.quoting import quoted, shown
from foveate.io.writing import check_file, check_folder
from foveate.loading import load_model

RESULTS, REPORT = "results.parquet", "report.html"


def measure(
    settings: Settings,
    out: Path,
    *,
    workers: int | None,
    minutes: float | None,
    timing: bool,
    table: Path | None = None,
) -> None:
    """Run what is not finished of a benchmark, and write its report.

    Args:
        settings: of the run.
        out: folder of results and report.
        workers: processes; `None` for two where a small model runs on a CPU.
        minutes: no cell is begun after so many.
        timing: whether to time the first token too.
        table: file of the table that is printed, Markdown, CSV or JSON; `None` for none.

    Raises:
        FoveateError: `out` cannot be written to, the model cannot be loaded, or none of the cells
            that were begun could be run.
    """
    check_folder(out)
    if out.is_dir():
        for name in (RESULTS, REPORT):
            check_file(out / name)
    check_table(table)
    store = Store(out / RESULTS)
    command = "foveate " + shlex.join(sys.argv[1:])
    model, processor = load_model(settings.model, settings.device, settings.dtype)
    runner = Runner(
        model, processor, settings,
        lambda name: campaign.find_task(name, settings.data, settings.max_pixels),
    )  # fmt: skip
    if workers is None:
        workers = _workers(model, settings.device)
    with keeping(lambda: _kept(store)), store.writing(), _bar() as progress:
        keys = campaign.execute(
            settings, runner, store, load=load_model, workers=workers, minutes=minutes,
            command=command, progress=progress,
        )  # fmt: skip
        summary = summarise(store.get(keys))
        if timing:
            _time(runner, store, summary)
            summary = summarise(store.get(keys))
        _finish(out, runner, summary, settings, command, len(keys))
        if table is not None:
            write_table(table, summary)
    _check_any_done(summary)


def _kept(store: Store) -> str:
    """What an interrupted run leaves."""
    if not len(store):
        return f"no cell was finished; {AGAIN}"
    return f"{len(store)} finished cells are saved in {shown(store.path, 120)}; {AGAIN}"


def _workers(model: Any, device: str) -> int:
    """Default number of processes: two if they can help."""
    small = device == "cpu" and model.num_parameters() < campaign.SMALL
    return min(2, os.cpu_count() or 1) if small else 1


def _check_any_done(summary: Summary) -> None:
    if summary.rows and not summary.done:
        why = shown(next((row["error"] for row in summary.rows if row.get("error")), ""), 160)
        raise BenchError(f"no cell could be run; the first error: {why}")


def summarise(rows: list[Row]) -> Summary:
    """Rows with the stages of the methods."""
    return Summary(rows, {name: get_method(name).stage for name in list_methods()})


def _time(runner: Runner, store: Store, summary: Summary) -> None:
    """Add times to first token to one cell of each method and budget that lacks them."""
    from foveate.bench.examples import time_first_tokens

    timed = {(r["method"], r["keep"]) for r in summary.done if r.get("ttft_ms")}
    wanted = [c for c in summary.configs if c not in timed and c[0] != ALL]
    if not wanted or not summary.tasks:
        return
    task = summary.tasks[0].name
    wanted = [c for c in wanted if summary.by_cell.get((*c, task), {}).get("status") == "done"]
    for config, (mine, unpruned) in time_first_tokens(runner, task, wanted).items():
        row = summary.by_cell[(*config, task)]
        store.add({**row, "ttft_ms": mine, "ttft_all_ms": unpruned})


def _finish(
    out: Path, runner: Runner, summary: Summary, settings: Settings, command: str, planned: int
) -> None:
    """Draw examples, write the report, and say what came out."""
    from foveate.bench.examples import draw
    from foveate.bench.report import Facts, write

    middle = sorted(settings.keeps)[len(settings.keeps) // 2]
    shots = draw(runner, summary, middle) if summary.tasks else []
    write(out / REPORT, summary, Facts(settings.model, command, planned), shots)
    console = stdout()
    show_table(summary, console)
    show_refusals(summary, console)
    remaining = planned - len(summary.rows)
    if remaining:
        console.print(
            f"[yellow]{remaining} of {planned} cells remain; run the same command to continue[/]"
        )
    bad = sum(row["status"] == "failed" for row in summary.rows)
    refused = sum(row["status"] == "refused" for row in summary.rows)
    console.print(
        f"{len(summary.done)} cells done, {refused} refused, {bad} failed; see "
        f"[bold]{escape(str(out / REPORT))}[/] and {escape(str(out / RESULTS))}",
        soft_wrap=True,
    )


@contextmanager
def _bar() -> Iterator[campaign.Progress]:
    """A bar with the remaining time; one line for every tenth where there is no terminal."""
    console = stderr()
    width = max(console.width - 40, 0)  # what counts and times leave
    bars = [BarColumn(bar_width=min(30, width // 2))] if width >= 30 else []
    name = min(44, width - (bars[0].bar_width or 0) if bars else width)
    columns: list[Any] = [
        TextColumn("{task.description}"), *bars, MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("cells".ljust(name)[:name], total=None)
        counts = {"all": 0, "done": 0}

        def begin(total: int, finished: int) -> None:
            counts.update(all=total, done=finished)
            bar.reset(task, total=total, completed=finished)
            if finished:
                console.print(f"{finished} of {total} cells were already finished")

        def done(cell: Cell, row: Row) -> None:
            counts["done"] += 1
            bar.update(task, advance=1, description=str(cell)[:name].ljust(name))
            tenth = max(counts["all"] // 10, 1)
            if not console.is_terminal and counts["done"] % tenth == 0:
                console.print(f"{counts['done']} of {counts['all']} cells")
            if row["status"] == "failed":
                console.print(f"[red]{escape(str(cell))} failed:[/] {escape(row['error'])}")

        yield campaign.Progress(begin, done)


def read_keeps(text: str) -> tuple[float, ...]:
    """Shares of `--keep`.

    Raises:
        BudgetError: one is no share.
    """
    try:
        keeps = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        keeps = ()
    if not keeps or not all(0 < keep <= 1 for keep in keeps):
        raise BudgetError(f"--keep takes shares in (0, 1] like 0.5,0.25, got {quoted(text)}")
    return keeps


def read_split(text: str) -> Split:
    """A split of `--split`.

    Raises:
        InputError: there is no such split.
    """
    if text not in get_args(Split):
        raise InputError(f"--split must be one of {', '.join(get_args(Split))}, got {quoted(text)}")
    return text  # type: ignore[return-value]


def check_minutes(minutes: float | None) -> None:
    """Refuse a time within which nothing could be done.

    Raises:
        InputError: it is not positive, or no number.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes takes a positive number, got {minutes}")


def check_data(settings: Settings, *, named: bool) -> None:
    """Find out before anything is loaded whether tasks that read data sets can.

    Args:
        settings: of the run.
        named: whether tasks were named one by one; of all, those without data are refused cells.

    Raises:
        InputError: there is no such folder.
        BenchError: a task's files are missing.
    """
    from foveate.bench.tasks.real import DataTask

    if settings.data is not None and not os.path.isdir(settings.data):
        raise InputError(f"--data: there is no folder {shown(settings.data, 120)}")
    for name in settings.tasks if named else ():
        task = campaign.find_task(name, settings.data)
        if isinstance(task, DataTask):
            task.items(settings.split)


def read_tasks(text: str) -> tuple[str, ...]:
    """Names of tasks; each is looked up before anything runs."""
    from foveate.bench.tasks import TASKS

    if text == "all":
        return tuple(TASKS)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise InputError(
            f"unknown task {quoted(unknown[0] if unknown else text)}; known: "
            f"{shown(', '.join(TASKS), 200)}"
        )
    return names
