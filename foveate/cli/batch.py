"""`foveate batch`: look, answer what is left, and say what came of it."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.markup import escape

from foveate.batch.cluster import Cluster, check_cluster, run_on_ray
from foveate.batch.job import Job
from foveate.batch.output import Totals
from foveate.batch.run import Look, look, run_here, writing
from foveate.cli.console import progress, stderr, stdout
from foveate.cli.inputs import check_model
from foveate.cli.interrupts import AGAIN, keeping
from foveate.errors import InputError
from foveate.io.quoting import shown
from foveate.loading import check_device


def run(job: Job, cluster: Cluster | None, *, dry: bool) -> None:
    """Answer what is left of a job.

    Args:
        job: what is asked.
        cluster: where Ray runs workers; `None` for this process.
        dry: whether to look only.

    Raises:
        FoveateError: the input, the output or the model cannot be used, or no row could be
            answered.
    """
    console = stdout()
    with progress() as steps:
        steps.say("reading the input")
        found = look(job)
        _check_model(job, cluster)
    console.print(escape(str(found)), soft_wrap=True)
    if dry:
        return
    totals = found.done
    if found.left:
        kept = f"finished shards are saved in {shown(job.output, 120)}; {AGAIN}"
        with keeping(lambda: kept), writing(job, found.plan):
            totals += _answer(job, cluster, found)
    _tell(job, totals, console)


def _check_model(job: Job, cluster: Cluster | None) -> None:
    """What is wrong with the model or the methods, found without weights."""
    if cluster is None:
        check_device(job.device)  # workers may have devices that are not here
    else:
        check_cluster(cluster, job.device)
    check_model(job.model, job.methods, job.dtype, job.keep_total)


def _answer(job: Job, cluster: Cluster | None, found: Look) -> Totals:
    """Answer the shards that are left, with a bar, or a line for every tenth."""
    console, left, done = stderr(), sum(shard.rows for shard in found.left), 0

    with progress(time_left=True) as steps:
        steps.say(f"answering {left:,} rows", left)

        def tick(rows: int) -> None:
            nonlocal done
            before, done = done, done + rows
            steps.tick(rows)
            if not console.is_terminal and 10 * before // left < 10 * done // left:
                console.print(f"{done:,} of {left:,} rows")

        work = run_here if cluster is None else partial(run_on_ray, cluster=cluster)
        return work(job, found.plan, found.left, tick)


def _tell(job: Job, totals: Totals, console: Console) -> None:
    """Say what the output holds."""
    answered = totals.rows - totals.errors
    if totals.errors:
        console.print(
            f"[yellow]{totals.errors:,} of {totals.rows:,} rows have an error; see the column "
            f"{escape(job.results[1])}[/]",
            soft_wrap=True,
        )
    if totals.rows and not answered:
        raise InputError(f"no row could be answered; see {job.output} for the reasons")
    where = escape(str(job.output))
    console.print(
        f"{answered:,} answers of {totals.new_tokens:,} tokens in [bold]{where}[/]", soft_wrap=True
    )
    if totals.visual_before:
        console.print(
            f"visual tokens: {totals.visual_before:,} before, {totals.visual_after:,} after "
            f"({totals.visual_after / totals.visual_before:.0%})"
        )
