"""Running a plan: shards that are done are passed over, the others are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from foveate.batch.job import Job
from foveate.batch.output import (
    LOCK,
    Totals,
    check_output,
    clear_remains,
    is_done,
    totals_of,
    write_note,
)
from foveate.batch.plan import Plan, Shard, make_plan
from foveate.batch.worker import Worker
from foveate.io.locking import locked
from foveate.io.quoting import shown


@dataclass(frozen=True)
class Look:
    """What there is to do, before it is done.

    Args:
        plan: all shards.
        done: sums of those that are done.
        left: those that are not.
    """

    plan: Plan
    done: Totals
    left: tuple[Shard, ...]

    def __str__(self) -> str:
        shards, finished = len(self.plan.shards), len(self.plan.shards) - len(self.left)
        return (
            f"{shards:,} shard{'s' * (shards != 1)}, {self.plan.rows:,} "
            f"row{'s' * (self.plan.rows != 1)}, {finished:,} shard{'s' * (finished != 1)} done"
        )


def look(job: Job) -> Look:
    """Find and check everything that can be, without a model; nothing is written.

    Raises:
        InputError: the input or the output cannot be used.
    """
    plan = make_plan(job)
    check_output(job, plan)
    known = [(shard, totals_of(job, shard)) for shard in plan.shards]
    done = [totals for _, totals in known if totals is not None and is_done(job, totals)]
    left = tuple(shard for shard, totals in known if not is_done(job, totals))
    return Look(plan, sum(done, Totals()), left)


@contextmanager
def writing(job: Job, plan: Plan) -> Iterator[None]:
    """Keep other runs out of the output, with a note of what it holds.

    Raises:
        InputError: another run writes to it, or none can.
    """
    message = f"another run writes to {shown(job.output, 100)}; wait for it"
    with locked(job.output / LOCK, message):
        clear_remains(job)
        write_note(job, plan)
        yield


def run_here(
    job: Job, plan: Plan, shards: Sequence[Shard], tick: Callable[[int], object]
) -> Totals:
    """Answer shards in this process, one after the other.

    Args:
        job: what is asked.
        plan: all shards.
        shards: those that are to be answered.
        tick: called with the number of rows that were answered since.

    Raises:
        FoveateError: see `Worker.run`; shards before stay.
    """
    worker = Worker(job, plan)
    return sum((worker.run(shard, tick) for shard in shards), Totals())
