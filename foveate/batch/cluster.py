"""Workers under Ray: processes, on one machine or on many, that each own a model.

Workers read and write shards themselves, so nothing large passes through Ray. Ray starts a worker
that died again and gives it the shard once more; a shard is written whole or not at all, so it does
no harm if it is answered twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    ray = import_ray(OPTION)
    with connected(ray, cluster.address, cluster.workers * cluster.cpus):
        count = min(cluster.workers, len(shards))
        kind = ray.remote(Worker).options(
            num_cpus=cluster.cpus, num_gpus=cluster.gpus,
            max_restarts=-1, max_task_retries=TRIES,
        )  # fmt: skip
        workers = [kind.remote(job, plan) for _ in range(count)]
        try:
            return _share(ray, workers, shards, tick)
        finally:
            for worker in workers:
                ray.kill(worker)


def _share(
    ray: Any, workers: Sequence[Any], shards: Sequence[Shard], tick: Callable[[int], object]
) -> Totals:
    """Give each worker a shard, and the next when it is done."""
    waiting, totals, lost = list(shards), Totals(), []
    busy = {worker.run.remote(shard): (worker, shard) for worker, shard in _pairs(workers, waiting)}
    while busy:
        (ready, *_), _ = ray.wait(list(busy))
        worker, shard = busy.pop(ready)
        try:
            totals += ray.get(ready)
            tick(shard.rows)
        except ray.exceptions.RayActorError:
            lost.append(shard.name)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FoveateError):
                raise error.cause from None
            raise
        busy.update({w.run.remote(s): (w, s) for w, s in _pairs([worker], waiting)})
    if lost:
        raise FoveateError(
            f"workers died of {len(lost)} shards, {TRIES + 1} times each: "
            f"{shown(', '.join(lost), 100)}; the others are done. Perhaps memory is short: try a "
            "smaller --batch or fewer --workers"
        )
    return totals


def _pairs(workers: Sequence[Any], waiting: list[Shard]) -> Iterator[tuple[Any, Shard]]:
    """Each worker with a shard, for as long as there are any."""
    for worker in workers:
        if waiting:
            yield worker, waiting.pop(0)
