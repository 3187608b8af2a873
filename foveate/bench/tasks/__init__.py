"""The tasks of FoveaBench, by name."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from foveate.bench.sample import Task
from foveate.bench.tasks.base import majority
from foveate.bench.tasks.real import REAL_TASKS
from foveate.bench.tasks.scenes import SCENE_TASKS
from foveate.bench.tasks.sequences import SEQUENCE_TASKS
from foveate.errors import BenchError

__all__ = ["TASKS", "get_task", "majority"]

TASKS: dict[str, Task] = {task.name: task for task in (*SCENE_TASKS, *SEQUENCE_TASKS, *REAL_TASKS)}
"""Every task. Those of data sets need a folder, which `get_task` gives them."""


def get_task(
    name: str,
    *,
    data: Path | str | None = None,
    scale: int | None = None,
    max_pixels: int | None = None,
) -> Task:
    """Find a task.

    Args:
        name: its name.
        data: folder of the data sets; only tasks that read one use it.
        scale: how many times larger than 128 pixels drawn images are; ignored elsewhere.
        max_pixels: most pixels of an image in a data set; ignored elsewhere.

    Returns:
        The task.

    Raises:
        BenchError: there is no such task.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(TASKS)}"
        raise BenchError(f"unknown task {name!r}; {hint}")
    task: Any = TASKS[name]
    known = {field.name for field in fields(task)}
    given: dict[str, Any] = {
        "data": Path(data) if data is not None else None,
        "scale": scale,
        "max_pixels": max_pixels,
    }
    return replace(task, **{k: v for k, v in given.items() if k in known and v is not None})
