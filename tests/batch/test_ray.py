"""Workers under Ray give what one process gives, also if one of them is killed."""

import os
import signal
import threading
import time

import pytest

from foveate.batch import cluster as cluster_module
from foveate.batch.cluster import Cluster, _Shards, check_cluster, run_on_ray
from foveate.batch.output import Totals
from foveate.batch.run import look, run_here, writing
from foveate.errors import FoveateError, InputError
from tests.batch.tables import read, write_lines
from tests.batch.test_batch import job

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'foveate[ray]'")
psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray of two CPUs for all tests of this file."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
        log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()


def workers():
    """Processes of ours that answer shards now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::MapWorker" in process.cmdline()[0]:
                found.append(process.pid)
        except (psutil.Error, IndexError):
            continue
    return found


def on_ray(one):
    found = look(one)
    with writing(one, found.plan):
        return run_on_ray(one, found.plan, found.left, lambda rows: None, Cluster(2, cpus=1))


def test_a_killed_worker_loses_nothing_and_doubles_nothing(tmp_path):
    source = write_lines(tmp_path, 24)
    one = job(source, tmp_path / "out", shard_rows=2)
    killed, over = [], threading.Event()

    def kill():
        while not over.is_set() and not killed:
            if list(one.output.glob("q-*.parquet")) and (busy := workers()):
                os.kill(busy[0], signal.SIGKILL)
                killed.append(busy[0])
            time.sleep(0.02)

    watch = threading.Thread(target=kill)
    watch.start()
    try:
        totals = on_ray(one)
    finally:
        over.set()
        watch.join()
    assert killed
    here = job(source, tmp_path / "here", shard_rows=2)
    found = look(here)
    with writing(here, found.plan):
        assert totals == run_here(here, found.plan, found.left, lambda rows: None)
    assert read(one.output) == read(here.output)
    assert [row["id"] for row in read(one.output)] == list(range(24))


def test_what_a_worker_cannot_do_is_told_as_it_is_here(tmp_path):
    one = job(write_lines(tmp_path, 2), tmp_path / "out", device="cuda")
    with pytest.raises(FoveateError, match=r"^device 'cuda' was asked for"):
        on_ray(one)
    assert read_totals(one) == Totals()


def test_a_shard_that_kills_its_workers_does_not_end_the_others(tmp_path, monkeypatch):
    source = write_lines(tmp_path, 8)
    one = job(source, tmp_path / "out", shard_rows=1)
    monkeypatch.setattr(cluster_module, "_Shards", Deadly)
    monkeypatch.setattr(cluster_module, "TRIES", 1)
    with pytest.raises(FoveateError, match=r"workers died of 1 shards, 2 times each: q-00001"):
        on_ray(one)
    assert [row["id"] for row in read(one.output)] == [0, 2, 3, 4, 5, 6, 7]


class Deadly(_Shards):
    """Dies of the second shard, when others may wait behind it."""

    def __call__(self, row):
        if row["shard"].first == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row)


def read_totals(one):
    return look(one).done


def test_gpus_and_devices_go_together(monkeypatch):
    with pytest.raises(InputError, match="--device cuda"):
        check_cluster(Cluster(2, gpus=1), "cpu")
    with pytest.raises(InputError, match="--gpus-per-worker"):
        check_cluster(Cluster(2), "cuda")
    check_cluster(Cluster(2, gpus=0.5), "cuda")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"foveate\[ray\]"):
        check_cluster(Cluster(2), "cpu")
