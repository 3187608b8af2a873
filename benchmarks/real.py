"""Accuracy and speed of a real model at 192, 128 and 64 tokens, in one table.

    make real MODEL=llava-hf/llava-1.5-7b-hf DATA=pope,gqa,textvqa_val,docvqa_val,ocrbench
    make real MODEL=/models/llava DATA=/tasks        # a folder of lmms-eval's task files
    python benchmarks/real.py --model M --data D --methods visionzip,random --limit 50

The model is a hub id or a folder. The data are names of lmms-eval's tasks, whose data sets come
from the hub, or a folder of task files (*.yaml) beside local data. lmms-eval must be installed in
the environment that runs this; `make real` sees to it. Every cell, a method at a budget, is kept
when done; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _real_table import ALL, BUDGETS, METHODS, TASKS, family, key, section

from foveate.cli.bench_speed import SpeedJob, bench_speed
from foveate.errors import FoveateError, InputError
from foveate.io.writing import write_json
from foveate.loading import check_device
from foveate.measure.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
LIMIT = 500
"""Documents of each task."""


def tasks_of(data: str) -> tuple[list[str], list[str]]:
    """Names of tasks, and what lmms-eval must be told to find them.

    Raises:
        InputError: it is a folder without task files, or names nothing.
    """
    names = [name.strip() for name in data.split(",") if name.strip()]
    if not names:
        raise InputError("DATA takes names of lmms-eval tasks, or a folder of task files")
    folder = Path(data)
    if not folder.is_dir():
        if "/" in data:
            raise InputError(f"there is no folder {data}")
        return names, []
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))]
    names = [found[1] for text in texts if (found := re.search(r"^task: *(\S+)", text, re.M))]
    if not names:
        raise InputError(f"{data} holds no task files (*.yaml with `task:`) of lmms-eval")
    return names, ["--include_path", str(folder.resolve())]


def evaluate(given: argparse.Namespace, arguments: str) -> dict[str, float]:
    """Scores in percent by task, from one run of lmms-eval.

    Raises:
        FoveateError: it failed; its last line says why.
    """
    names, where = tasks_of(given.data)
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "lmms_eval", "--model", "foveate", "--model_args", arguments,
            "--tasks", ",".join(names), *where, "--batch_size", str(given.batch),
            "--device", given.device, "--output_path", out,
        ]  # fmt: skip
        command += ["--limit", str(given.limit)] if given.limit else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        found = sorted(Path(out).rglob("*results.json"))
        if done.returncode or not found:
            raise FoveateError(reason(done.stderr))
        results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
    return {name: score(name, results[name], given.limit) for name in names}


def reason(stderr: str) -> str:
    """The line of an error that says what is wrong: the last that names one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*Error: ", line)]
    line = [*lines[-1:], *errors[-1:]][-1] if lines else "lmms-eval said nothing"
    return line.rpartition("Error: ")[2]


def score(task: str, result: Mapping[str, Any], limit: int) -> float:
    """A task's score in percent; of unknown tasks the first mean that lmms-eval gives.

    Raises:
        FoveateError: there is none.
    """
    known = TASKS.get(task)
    names = [f"{known.metric},none"] if known else [k for k in result if k.endswith(",none")]
    value = next((result[k] for k in names if isinstance(result.get(k), int | float)), None)
    if value is None:
        raise FoveateError(f"lmms-eval gave no score of {task}; it gave {', '.join(result)}")
    asked = min(limit, known.total) if known and known.total and limit else 0
    return 100 * value * (known.total / asked if known and asked else 1)


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Key of each cell, and the model arguments of lmms-eval."""
    yield ALL, f"pretrained={given.model}"
    for budget in given.budgets:
        for method in given.methods:
            yield key(method, budget), f"pretrained={given.model},method={method},keep={budget}"


def accuracy(given: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill the cells that have no scores yet."""
    for name, arguments in cells(given):
        if "scores" in result["cells"].get(name, {}):
            continue
        print(name, flush=True)
        try:
            result["cells"][name] = {"scores": evaluate(given, arguments)}
        except FoveateError as error:
            if name == ALL:  # nothing would work
                raise
            result["cells"][name] = {"error": str(error)}
            print(f"  {error}", flush=True)
        write_json(given.out, result, indent=1)


def speed(given: argparse.Namespace, result: dict[str, Any]) -> None:
    """Speed-ups of the prefill at each budget, of the methods that have scores."""
    for budget in given.budgets:
        ready = [m for m in given.methods if "scores" in result["cells"][key(m, budget)]]
        known = result["speed"].get(str(budget), {})
        if not ready or set(ready) <= set(known):
            continue
        job = SpeedJob(
            given.model, ",".join(ready), keep=str(budget), tokens=str(given.tokens), batch="1",
            repeats=given.repeats, new_tokens=4, device=given.device,
        )  # fmt: skip
        (cell,) = bench_speed(job)["cells"]
        rows = {name: row for name, row in cell.get("rows", {}).items() if name != ALL}
        result["speed"][str(budget)] = {n: row["speed_up"]["prefill"] for n, row in rows.items()}
        write_json(given.out, result, indent=1)


def begin(given: argparse.Namespace) -> dict[str, Any]:
    """What the result file holds, or a new result.

    Raises:
        InputError: it is of another model, other data or another machine.
    """
    head = {
        "model": given.model, "tasks": tasks_of(given.data)[0], "limit": given.limit,
        "speed_tokens": given.tokens, "machine": describe_machine(check_device(given.device)),
    }  # fmt: skip
    if not given.out.exists():
        given.out.parent.mkdir(parents=True, exist_ok=True)
        return {**head, "cells": {}, "speed": {}}
    old = json.loads(given.out.read_text(encoding="utf-8"))
    if differs := [name for name in head if old.get(name) != head[name]]:
        raise InputError(
            f"{given.out} was measured with other {', '.join(differs)}; name another file with "
            "--out, or delete it"
        )
    return old


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--data", required=True, help="tasks of lmms-eval, or a folder of them")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--limit", type=int, default=LIMIT, help="documents of a task; 0 for all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens of the speed prompt")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the result file")
    found = parser.parse_args(given)
    found.methods = found.methods.split(",")
    found.budgets = [int(part) for part in found.budgets.split(",")]
    if found.out is None:
        name = re.sub(r"[^\w.-]+", "_", family(found.model).strip("/")).lower()
        found.out = RESULTS / f"real_{name}.json"
    return found


def main() -> None:
    given = arguments()
    try:
        if not given.model:
            raise InputError("MODEL takes a hub id or a folder")
        if find_spec("lmms_eval") is None:
            raise FoveateError("lmms-eval is not installed here; `make real` installs it")
        result = begin(given)
        accuracy(given, result)
        speed(given, result)
    except FoveateError as error:
        sys.exit(f"error: {error}")
    print(section([result]))
    print(f"kept in {given.out}; python benchmarks/quality.py renews docs/results-real.md")


if __name__ == "__main__":
    main()
