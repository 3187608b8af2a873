"""What a benchmark run is asked for, and the key under which each of its cells is remembered."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from foveate.bench.levels import ALL, BASELINES, takes_keep
from foveate.bench.sample import Split
from foveate.core import get_method, list_methods
from foveate.errors import InputError
from foveate.io.quoting import quoted

_MEASURES = (
    "core", "engine", "families", "io", "measure", "methods", "ops", "signals", "tiny",
    "bench/tasks",
)  # fmt: skip
_FILES = ("judge", "levels", "outcome", "prompt", "recall", "runner")  # of bench


@dataclass(frozen=True)
class Settings:
    """A run. The same settings always ask the same questions.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        methods: names; baselines are added.
        keeps: shares that survive.
        tasks: names.
        samples: samples of each task.
        seed: seed of the first sample.
        split: which of a task's splits.
        difficulty: 0 (easiest) to 1.
        clutter: 0 (bare) to 1.
        data: folder of data sets that some tasks read.
        batch: samples that go through the model together.
        device: where the model runs.
        dtype: of its weights, or `auto`.
        max_new_tokens: longest answer.
        hint: put after every question.
        max_pixels: most pixels of an image in a data set.
    """

    model: str
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    tasks: tuple[str, ...]
    samples: int = 48
    seed: int = 0
    split: Split = "test"
    difficulty: float = 0.5
    clutter: float = 0.5
    data: str | None = None
    batch: int = 16
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 8
    hint: str = ""
    max_pixels: int | None = None

    def asks(self) -> dict[str, Any]:
        """What decides about a cell's numbers, besides method, budget and task."""
        fields = asdict(self)
        for name in ("methods", "keeps", "tasks", "model", "data", "max_pixels"):
            del fields[name]
        return fields


@dataclass(frozen=True)
class Cell:
    """A method at a budget on a task.

    Args:
        method: its name, or `ALL` for the unpruned model.
        keep: share that survives; `None` where the method decides.
        task: the task's name.
    """

    method: str
    keep: float | None
    task: str

    def __str__(self) -> str:
        budget = "" if self.keep is None else f" {self.keep:g}"
        return f"{self.task}: {self.method}{budget}"


def cells(settings: Settings) -> Iterator[Cell]:
    """All cells of a run, task by task, the unpruned model and the baselines first."""
    names = [*BASELINES, *(name for name in settings.methods if name not in BASELINES)]
    for task in settings.tasks:
        yield Cell(ALL, None, task)
        for name in names:
            for keep in settings.keeps if takes_keep(name) else (None,):
                yield Cell(name, keep, task)


def chosen_methods(text: str) -> tuple[str, ...]:
    """Names from `all` or a comma-separated list; unknown ones raise with near matches."""
    if text == "all":
        return tuple(list_methods())
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--methods takes `all`, or names by commas, got {quoted(text)}")
    return tuple(get_method(name).slug for name in dict.fromkeys(names))


def fingerprint(model: Any) -> str:
    """A short digest of a model's config and weights; the first values of each tensor count."""
    digest = hashlib.sha256(str(sorted(model.config.to_dict().items(), key=str)).encode())
    for name, tensor in model.state_dict().items():
        head = tensor.detach().flatten()[:16].double().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{head.tolist()}".encode())
    return digest.hexdigest()[:12]


@functools.cache
def versions() -> dict[str, str]:
    """What numbers depend on besides the settings. `code` is a digest of what measures them."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in _MEASURES:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in _FILES:
        digest.update((root / "bench" / f"{name}.py").read_bytes())
    try:
        own = version("foveate")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "foveate": own,
        "code": digest.hexdigest()[:12],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def key(cell: Cell, settings: Settings, model: str, method: dict[str, Any] | None) -> str:
    """The name under which a cell is remembered.

    Args:
        cell: the cell.
        settings: of the run.
        model: the model's fingerprint.
        method: the method's hyper-parameters.
    """
    used = {name: versions()[name] for name in ("code", "torch", "transformers")}
    facts = [asdict(cell), settings.asks(), model, method, used]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
