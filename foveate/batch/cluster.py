"""Workers under Ray: processes, on one machine or on many, that each own a model.

Ray Data hands shards to a pool of workers. They read and write the shards themselves, so nothing
large passes through Ray, and a file that is there is what says that a shard is done: checkpoints of
Ray Data's own come only at the end of small jobs. Ray starts a worker that died again and gives it
the shard once more; a shard is written whole or not at all, so it does no harm if it is answered
twice.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from foveate.batch.job import Job
from foveate.batch.output import Totals
from foveate.batch.plan import Plan, Shard
from foveate.batch.worker import Worker
from foveate.errors import FoveateError
from foveate.integrations.ray_cluster import check_gpus, connected, import_ray
from foveate.io.quoting import shown

TRIES = 3
"""How often a shard is given to a worker again after one died of it."""
OPTION = "--workers"


@dataclass(frozen=True)
class Cluster:
    """Where workers run.

    Args:
        workers: how many.
        gpus: GPUs of each, a fraction where several share one.
        cpus: CPUs of each.
        address: of a Ray cluster, or `auto`; `None` for `RAY_ADDRESS`, and without that for this
            machine.
    """

    workers: int
    gpus: float = 0
    cpus: float = 1
    address: str | None = None


def check_cluster(cluster: Cluster, device: str) -> None:
    """Refuse what cannot be run.

    Raises:
        InputError: GPUs and device do not go together, or Ray is not installed.
    """
    import_ray(OPTION)
    check_gpus(cluster.gpus, device, (OPTION, "--gpus-per-worker"))


def run_on_ray(
    job: Job,
    plan: Plan,
    shards: Sequence[Shard],
    tick: Callable[[int], object],
    cluster: Cluster,
) -> Totals:
    """Answer shards in workers; takes the arguments of `run_here`.

    Raises:
        FoveateError: see `Worker.run`; or a shard could not be answered because workers died of it
            again and again. The others are answered first.
    """
    ray, totals, left = import_ray(OPTION), Totals(), {shard.name: shard for shard in shards}
    with connected(ray, cluster.address, cluster.workers * cluster.cpus), _quiet() as data:
        answered = data.from_items(
            [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
        ).map(
            _Shards, fn_constructor_args=(job, plan),
            compute=data.ActorPoolStrategy(
                size=min(cluster.workers, len(shards)),
                max_tasks_in_flight_per_actor=1,  # one that waits would die of the one before it
            ),
            num_cpus=cluster.cpus, num_gpus=cluster.gpus,
            ray_remote_args_fn=lambda: {"max_task_retries": TRIES},
        )  # fmt: skip
        for row in answered.iter_rows():
            if row["error"] is not None:
                raise row["error"]
            totals += row["totals"]
            tick(left.pop(row["name"]).rows)
    if left:
        raise FoveateError(
            f"workers died of {len(left)} shards, {TRIES + 1} times each: "
            f"{shown(', '.join(left), 100)}; the others are done. Perhaps memory is short: try a "
            "smaller --batch or fewer --workers"
        )
    return totals


class _Shards:
    """A worker, as Ray Data calls it."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self._worker = Worker(job, plan)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = row["shard"]
        try:
            totals, error = self._worker.run(shard), None
        except FoveateError as refused:
            totals, error = None, refused
        return {"name": shard.name, "totals": totals, "error": error}


@contextmanager
def _quiet() -> Iterator[Any]:
    """The module `ray.data`, whose runs go on where a worker has died too often."""
    from ray import data

    context = data.DataContext.get_current()
    before = context.max_errored_blocks, context.enable_progress_bars
    context.max_errored_blocks, context.enable_progress_bars = -1, False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():  # of the argument that bounds how often a shard is retried
            warnings.simplefilter("ignore", DeprecationWarning)
            yield data
    finally:
        context.max_errored_blocks, context.enable_progress_bars = before
