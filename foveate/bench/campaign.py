"""A whole run: all cells that are not finished yet, in one process or in several."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from foveate.bench.outcome import Outcome
from foveate.bench.runner import Runner
from foveate.bench.sample import Task
from foveate.bench.settings import Cell, Settings, cells, versions
from foveate.bench.store import Row, Store
from foveate.errors import FoveateError

Load = Callable[[str, str, str], tuple[Any, Any]]
SMALL = 50_000_000
"""Parameters up to which a model is run by several processes on a CPU."""

_runner: Runner | None = None  # of a worker process; set once, when it starts


@dataclass(frozen=True)
class Progress:
    """Called as a run goes on.

    Args:
        begin: with the number of cells, and of those that are finished already.
        done: with a finished cell and its row.
    """

    begin: Callable[[int, int], None]
    done: Callable[[Cell, Row], None]


def find_task(name: str, data: str | None = None, max_pixels: int | None = None) -> Task:
    """The task of a name, reading data sets from a folder where it needs one."""
    from foveate.bench.tasks import get_task

    return get_task(name, data=data, max_pixels=max_pixels)


def execute(
    settings: Settings,
    runner: Runner,
    store: Store,
    *,
    load: Load,
    workers: int = 1,
    minutes: float | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> list[str]:
    """Run what is not finished; every cell is stored as soon as it is.

    Args:
        settings: what is asked.
        runner: of this process.
        store: open for writing.
        load: loads the model in a worker.
        workers: processes.
        minutes: no cell is begun after so many.
        command: how this was asked for, for the record.
        progress: what to tell.

    Returns:
        Keys of all cells of the run, in order; those that `minutes` left out are not in the store.
    """
    plan = [(cell, runner.key(cell)) for cell in cells(settings)]
    todo = [(cell, key) for cell, key in plan if key not in store]
    if progress:
        progress.begin(len(plan), len(plan) - len(todo))
    end = None if minutes is None else time.monotonic() + 60 * minutes
    source = _here(runner, todo, end) if workers < 2 else _apart(settings, todo, load, workers, end)
    with closing(source):
        for (cell, key), outcome in source:
            row = _row(cell, key, settings, runner.fingerprint, command, outcome)
            store.add(row)
            if progress:
                progress.done(cell, row)
    return [key for _, key in plan]


Todo = Sequence[tuple[Cell, str]]
Finished = Generator[tuple[tuple[Cell, str], Outcome], None, None]


def _here(runner: Runner, todo: Todo, end: float | None) -> Finished:
    for item in todo:
        if end is not None and time.monotonic() > end:
            return
        yield item, runner.run(item[0])


def _apart(settings: Settings, todo: Todo, load: Load, workers: int, end: float | None) -> Finished:
    """As `_here`, in processes of one thread each."""
    waiting = list(reversed(todo))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (settings, load, os.getpid()))
    running: dict[Any, tuple[Cell, str]] = {}
    others = multiprocessing.active_children()
    try:
        while waiting or running:
            if end is not None and time.monotonic() > end:
                waiting.clear()
            while waiting and len(running) < 2 * workers:
                item = waiting.pop()
                with _deaf():
                    running[pool.submit(_work, item[0])] = item
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                item = running.pop(future)
                yield item, future.result()
    except BrokenProcessPool as error:
        names = ", ".join(str(cell) for cell, _ in running.values())
        raise FoveateError(
            f"a worker process died, perhaps for lack of memory, while it ran one of: {names}. "
            "Finished cells are kept; run again with --workers 1 or a smaller --batch"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if running:  # nobody waits for their cells, which may take minutes
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin in the block take no notice of Ctrl-C, which a terminal sends to all:
    this one ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(settings: Settings, load: Load, parent: int) -> None:
    global _runner
    torch.set_num_threads(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    model, processor = load(settings.model, settings.device, settings.dtype)
    _runner = Runner(
        model,
        processor,
        settings,
        lambda name: find_task(name, settings.data, settings.max_pixels),
    )


def _watch(parent: int) -> None:
    """End when the process that started this one has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(cell: Cell) -> Outcome:
    assert _runner is not None
    return _runner.run(cell)


def _row(
    cell: Cell, key: str, settings: Settings, fingerprint: str, command: str, outcome: Outcome
) -> Row:
    return {
        "key": key,
        "model": settings.model,
        "fingerprint": fingerprint,
        "method": cell.method,
        "keep": cell.keep,
        "task": cell.task,
        "split": settings.split,
        "samples": settings.samples,
        "seed": settings.seed,
        "settings": json.dumps({**settings.asks(), "method": outcome.method}, default=str),
        "command": command,
        "versions": json.dumps(versions()),
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        **outcome.to_dict(),
    }


def machine() -> str:
    """Processor and cores, in words."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if "model name" in line]
        name = names[0] if names else name
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
