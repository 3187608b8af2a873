"""What the command prints where: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text


def stdout() -> Console:
    """Console for results; made anew, so that redirected streams are followed."""
    return Console(highlight=False)


def stderr() -> Console:
    """Console for progress and errors."""
    return Console(stderr=True, highlight=False)


def hush() -> None:
    """Keep warnings and bars of other libraries off the screen, here and in processes begun here.

    A bar of theirs would break one of ours.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # what the user asks of Python holds
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="foveate")


def deliver_json(data: Any, path: Path) -> None:
    """Save JSON in a file, or print it where the path is `-`."""
    from foveate.io.writing import write_json

    if str(path) == "-":
        print(json.dumps(data, indent=2))
    else:
        write_json(path, data)
        stdout().print(f"saved in {escape(str(path))}", soft_wrap=True)


class _Count(MofNCompleteColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Left(ProgressColumn):
    """Time that is left if the rest goes as what is done went."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text()
        left = round(task.elapsed * (task.total / task.completed - 1))
        return Text(f"{left // 60}:{left % 60:02} left", style="cyan")


class Steps:
    """One line of progress; silent when stderr is not a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def say(self, what: str, total: int | None = None) -> None:
        """Begin something; `total` steps make a bar, `None` only spins."""
        self._progress.reset(self._task, total=total, description=what)

    def tick(self, steps: float = 1) -> None:
        """One step of it is done, or several."""
        self._progress.advance(self._task, steps)

    def name(self, what: str) -> None:
        """Say what is being done, without beginning anew."""
        self._progress.update(self._task, description=what)


@contextmanager
def progress(*, time_left: bool = False, shown: bool = True) -> Iterator[Steps]:
    """Show progress while something runs.

    Args:
        time_left: show how long it will take, instead of how many steps are done.
        shown: whether this process shows it; of several that do the same, one should.
    """
    console = stderr()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _Left() if time_left else _Count(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as bar:
        yield Steps(bar)
