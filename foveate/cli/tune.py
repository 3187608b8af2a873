"""`foveate tune`: search a recipe, and print what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.console import progress, stdout
from foveate.core.saving import FILE
from foveate.errors import FoveateError
from foveate.io.quoting import shown
from foveate.loading import load_model
from foveate.measure.machine import warm_heap
from foveate.tune.halving import Candidate
from foveate.tune.job import LEDGER, PAGE, POLICY, Options, Tuning
from foveate.tune.replies import Score
from foveate.tune.space import describe
from foveate.tune.study import Found
from foveate.tune.verdict import Verdict

REASONS = 8  # of rejected recipes that are printed


def search(
    model: str,
    data: Path,
    out: Path,
    options: Options,
    weights: tuple[str, str],
    threads: int | None,
) -> None:
    """Search, write and print.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        data: file of questions.
        out: folder of what comes of it.
        options: of the search.
        weights: device and dtype.
        threads: math threads on a CPU, or `None` for torch's choice.

    Raises:
        FoveateError: something cannot be served, or no recipe meets the targets.
    """
    job = Tuning(model, data, out, options)
    if weights[0] == "cpu":
        if job.aim.timed:
            warm_heap(threads)
        if threads is not None:
            torch.set_num_threads(threads)
    console = stdout()
    if (out / LEDGER).exists():
        console.print(f"resuming from {escape(str(out / LEDGER))}", soft_wrap=True)
    verdict = _run(job, weights)
    show(verdict, console)
    console.print(f"report saved in {escape(str(out / PAGE))}", soft_wrap=True)
    if verdict.adapted is not None:
        path = escape(str(out / POLICY))
        console.print(f"policy saved in {path}; use it with --adaptive {path}", soft_wrap=True)
    if verdict.chosen is None:
        targets = ", ".join(map(str, verdict.aim.targets))
        raise FoveateError(
            f"no recipe meets {targets} on the questions of the search; relax the targets, or set "
            f"more --trials. {_nearest(verdict)}"
        )
    path = escape(str(out / FILE))
    console.print(f"recipe saved in {path}; use it with --method {path}", soft_wrap=True)


def _run(job: Tuning, weights: tuple[str, str]) -> Verdict:
    """Load the model and search; shows progress."""
    with progress() as steps:
        steps.say(f"loading {job.model}")
        loaded, processor = load_model(job.model, *weights)
        steps.say("answering with all tokens", job.options.plan.trials)

        def tick(found: Found) -> None:
            steps.name(f"searching, {len(found.refused)} refused")
            steps.tick()

        def judging(count: int) -> Callable[[], object]:
            steps.say("answering held-out questions", count)
            return steps.tick

        return job.run(loaded, processor, tick, judging)


def show(verdict: Verdict, console: Console) -> None:
    """Print the front, the chosen recipe, and what was rejected."""
    if verdict.front:
        console.print(_front(verdict))
    if verdict.chosen is not None:
        console.print(f"[cyan]chosen[/] {escape(describe(verdict.chosen.recipe))}", soft_wrap=True)
    if verdict.gain is not None and verdict.published is not None:
        gain, low, high = verdict.gain
        console.print(
            f"{gain:+.1f} points ({low:+.1f} to {high:+.1f}) over the best published recipe, "
            f"{escape(describe(verdict.published.recipe))}, on held-out questions",
            soft_wrap=True,
        )
    elif verdict.published is None:
        console.print("[yellow]no published recipe reached the end and met the targets[/]")
    if verdict.adapted is not None:
        gain, low, high = verdict.adapted.gain
        mine, other = verdict.adapted.flops
        console.print(
            f"[cyan]policy[/] {gain:+.1f} points ({low:+.1f} to {high:+.1f}) over "
            f"{escape(describe(verdict.adapted.fixed))}, the best recipe for all questions, on "
            f"held-out ones; {100 * mine:.1f} % of FLOPs against {100 * other:.1f} %",
            soft_wrap=True,
        )
    if not verdict.found.finished:
        console.print("[yellow]time ran out before all trials were run[/]")
    _rejected(verdict, console)


def _front(verdict: Verdict) -> Table:
    costs = verdict.aim.costs
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    table.add_column("recipe", overflow="fold")
    quality = verdict.aim.quality
    for heading in (quality, "change", "held out", "change", *(f"{c}\nof all" for c in costs)):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [*verdict.front]
    rows += [c for c in (verdict.published,) if c is not None and c not in rows]
    for candidate in rows:
        cells = [*_cells(candidate.scored), *_cells(verdict.score(candidate))]
        shares = [f"{100 * candidate.scored.metrics[cost]:.1f} %" for cost in costs]
        style = "bold" if candidate is verdict.chosen else ""
        table.add_row(_name(candidate), *cells, *shares, style=style)
    return table


def _name(candidate: Candidate) -> str:
    mark = " (published)" if candidate.published else ""
    return escape(describe(candidate.recipe) + mark)


def _cells(score: Score | None) -> list[str]:
    """A share and its interval below, and the change in points and its interval."""
    if score is None:
        return ["", ""]
    (low, high), change = score.interval, score.change
    return [
        f"{100 * score.quality:.1f} %\n{100 * low:.1f}-{100 * high:.1f}",
        f"{change[0]:+.1f}\n±{(change[2] - change[1]) / 2:.1f}",
    ]


def _rejected(verdict: Verdict, console: Console) -> None:
    reasons = verdict.rejected()
    for why, count in reasons[:REASONS]:
        times = f"{count} x " if count > 1 else ""
        console.print(f"[dim]rejected: {times}{escape(shown(why, 150))}[/]", soft_wrap=True)
    if more := sum(count for _, count in reasons[REASONS:]):
        console.print(f"[dim]and {more} others, see the report[/]")


def _nearest(verdict: Verdict) -> str:
    """The finalist of the best quality, in words."""
    finalists = verdict.found.finalists
    if not finalists:
        return "None answered all questions."
    best = max(finalists, key=lambda candidate: candidate.scored.quality)
    metrics = best.scored.metrics
    says = ", ".join(f"{t.metric} {metrics[t.metric]:.3g}" for t in verdict.aim.targets)
    return f"The best was {shown(describe(best.recipe), 120)}: {says}."
