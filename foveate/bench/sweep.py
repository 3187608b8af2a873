"""A sweep over prompt lengths and batch sizes; a cell is saved when done, and not done again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.bench.speed import ALL, Bench, Contender, Rounds, measure_cell
from foveate.errors import InputError
from foveate.families import find_family
from foveate.io.quoting import quoted
from foveate.io.writing import write_json
from foveate.measure.machine import describe_machine, heap_is_warm
from foveate.measure.memory import how_peaks_are_measured

Prompts = Callable[[int, int], Mapping[str, Any]]
"""Model inputs for (visual tokens of a row, rows)."""
RULE = (
    "red, `slower`: slower than all tokens in three quarters of the rounds or more; yellow, "
    "`perhaps_slower`: in half of them"
)


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Args:
        model: its name, for the result.
        tokens: visual tokens of a row, one cell each...
        batches: ...for each number of rows.
        repeats: timed rounds of a cell.
        warmup: untimed rounds before them.
        minutes: time for all cells; repeats are cut where it does not suffice. `None` for no limit.
        labels: what else the numbers depend on, for the result.
    """

    model: str
    tokens: tuple[int, ...] = (576,)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 20
    warmup: int = 1
    minutes: float | None = None
    labels: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one of them is not positive, or there is none.
        """
        for name in ("tokens", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise InputError(f"{name} must be different positive numbers, got {quoted(values)}")
        if self.repeats < 1 or (self.minutes is not None and not 0 < self.minutes < math.inf):
            raise InputError("repeats and minutes must be positive")

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(tokens, rows) of each cell, the cheap ones first."""
        cells = [(tokens, batch) for tokens in self.tokens for batch in self.batches]
        return sorted(cells, key=lambda cell: (cell[0] * cell[1], cell))

    def runs(self, contenders: int) -> int:
        """Runs of a cell, untimed ones among them."""
        return contenders * (1 + self.warmup + self.repeats)


def run_sweep(
    sweep: Sweep,
    bench: Bench,
    entrants: Mapping[str, Contender],
    prompts: Prompts,
    path: Path | None = None,
    say: Callable[[str, float], object] | None = None,
) -> dict[str, Any]:
    """Measure all cells that a result file does not have yet.

    Args:
        sweep: what.
        bench: the model.
        entrants: all tokens and the methods.
        prompts: makes the inputs of a cell.
        path: where the result is kept; read first, written after every cell.
        say: called after every run with what is done and its share of all work, in tokens.

    Returns:
        JSON values: `machine`, `settings`, `cells`.

    Raises:
        InputError: the file holds something else, or was measured elsewhere or otherwise.
    """
    result = _begin(_head(sweep, bench, entrants), path)
    done = {(cell["tokens"], cell["batch"]) for cell in result["cells"]}
    remaining = [cell for cell in sweep.cells if cell not in done]
    ends = None if sweep.minutes is None else time.monotonic() + 60 * sweep.minutes
    while remaining:
        (tokens, batch), weight = remaining[0], sum(t * b for t, b in remaining)
        share = tokens * batch / weight
        seconds = None if ends is None else max(ends - time.monotonic(), 0) * share
        cell = _cell(sweep, bench, entrants, prompts, remaining.pop(0), seconds, say)
        result["cells"].append(cell)
        result["cells"].sort(key=lambda cell: (cell["tokens"], cell["batch"]))
        if path is not None:
            write_json(path, result, indent=1)
    return result


def _cell(
    sweep: Sweep,
    bench: Bench,
    entrants: Mapping[str, Contender],
    prompts: Prompts,
    cell: tuple[int, int],
    seconds: float | None,
    say: Callable[[str, float], object] | None,
) -> dict[str, Any]:
    """One cell of the result; out of memory is a result too."""
    tokens, batch = cell
    runs, ticked = sweep.runs(len(entrants)), 0

    def tick() -> None:
        nonlocal ticked
        ticked += 1
        if say is not None:
            say(f"{tokens:,} visual tokens, batch {batch}", tokens * batch)

    found: dict[str, Any] = {"tokens": tokens, "batch": batch}
    try:
        inputs = prompts(tokens, batch)
        placeholder = find_family(bench.model).placeholder_ids["image"]
        found["visual_tokens"] = int((inputs["input_ids"] == placeholder).sum()) // batch
        found["prompt_tokens"] = inputs["input_ids"].shape[1]
        rounds = Rounds(sweep.repeats, sweep.warmup, seconds)
        found |= measure_cell(bench, inputs, entrants, rounds, tick)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        found["error"] = "out of memory"
    for _ in range(runs - ticked):
        tick()
    if found.get("repeats", sweep.repeats) < sweep.repeats:
        found["cut"] = f"{found['repeats']} of {sweep.repeats} repeats, to keep the time limit"
    return found


def _head(sweep: Sweep, bench: Bench, entrants: Mapping[str, Contender]) -> dict[str, Any]:
    """What numbers depend on: cells are only added to a file with the same."""
    model = bench.model
    device = model.device
    clock = "process CPU seconds" if bench.cpu_time else "wall-clock seconds"
    if device.type == "cuda":
        clock = "CUDA events"
    settings = {
        "model": sweep.model,
        "model_type": model.config.model_type,
        "methods": [e.method.to_dict() for e in entrants.values() if e.method is not None],
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "repeats": sweep.repeats,
        "warmup": sweep.warmup,
        "new_tokens": bench.new_tokens,
        "time": f"{clock}, contenders in turn, plain forward calls",
        "heap": "kept warm" if heap_is_warm() else "as the system has it",
        "memory": how_peaks_are_measured(device),
        "rule": RULE,
        **(sweep.labels or {}),
    }
    head = {"what": "foveate speed", "machine": describe_machine(device), "settings": settings}
    return json.loads(json.dumps(head))  # as a file would give it back


def _begin(head: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """What a file holds already, or a new result."""
    if path is None or not path.is_file():
        return {**head, "cells": []}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = {key: old[key] for key in head}
        cells = list(old["cells"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} holds no result of a speed benchmark; name another file"
        ) from None
    for part in ("machine", "settings"):
        names = sorted({*head[part], *same[part]})
        differs = [n for n in names if head[part].get(n) != same[part].get(n)]
        if differs:
            raise InputError(
                f"{path} was measured with other {part} ({', '.join(differs)}), so cells cannot be "
                "added to it; name another file, or delete it"
            )
    return {**head, "cells": [cell for cell in cells if "error" not in cell]}


def losses(result: Mapping[str, Any]) -> list[str]:
    """Where a method was slower than all tokens, a line each; red in tables."""
    lines = []
    for cell, name, row in methods_of(result):
        for what in row["slower"]:
            ratio = row["speed_up"][what]
            lines.append(
                f"{name}, {cell['visual_tokens']:,} visual tokens, batch {cell['batch']}: {what} "
                f"{ratio['median']:.2f}x ({ratio['q25']:.2f} to {ratio['q75']:.2f})"
            )
    return lines


def methods_of(result: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Any]]:
    """(cell, name, row) of every method in every cell that could be measured."""
    cells: Sequence[Mapping[str, Any]] = result["cells"]
    for cell in cells:
        for name, row in cell.get("rows", {}).items():
            if name != ALL:
                yield cell, name, row
