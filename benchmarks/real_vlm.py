"""Do methods rank on a VLM of real parts as they do on the tiny one?

    python scripts/real_parts.py vlm
    python -m recipes.real_vlm --model VLM --out RUN --cache CACHE --data ../shared/data
    python benchmarks/real_vlm.py --model VLM --data ../shared/data
    python benchmarks/quality.py                    # the page

Both models are asked held-out questions about drawn scenes, the same ones; the model of real parts
also questions of easy-VQA's test part. Each is asked with all tokens, of a grey image, and with
every method at each budget. `--adapter` is what training changed.

Answers are kept in `--out`, and the same command goes on where it was cut off. `--minutes` ends it
early; of methods that cut elsewhere than after the projector, which are asked last and one budget
after the other, those are reported that were asked everything by then. `--methods` asks some; of
the others the result file keeps the answers that it has, if they are of the same training and
questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from _real_vlm import ALL, BLANK, ask, ask_each
from _real_vlm_page import RESULT
from _tower import Name
from real_tower import Run

from foveate import tiny
from foveate.bench.levels import method_at
from foveate.bench.sample import Sample
from foveate.bench.tasks import get_task
from foveate.core import Method, get_method
from foveate.errors import FoveateError
from foveate.families import find_family
from foveate.loading import load_model
from foveate.measure.machine import describe_machine
from recipes import real_adapter

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "recipes" / "real_vlm.safetensors"
AFTER = (
    "random", "uniform", "downsample", "divprune", "visionzip", "fastervlm", "vtc-cls", "hiprune",
    "scope", "llava-prumerge", "prunesid", "vispruner", "cdpruner", "fopru", "holov", "idpruner",
)  # fmt: skip
ELSEWHERE = (
    "fastv", "pyramiddrop", "sparsevlm", "dart", "feather", "adatoken-3d", "transprune",
    "lvlm-csp", "holitom-inner", "flowcut-inner", "todre", "vflowopt", "tome", "flowcut",
    "cls-drop",
)  # fmt: skip
"""Methods that cut in the encoder, in the language model, or more than once."""
KEEPS = (0.25, 0.125)
UNMOVED, PLACES = ("random", "divprune", "vtc-cls", "hiprune"), "position"
DRAWN = (
    "attribute", "position", "digits", "relation", "counting", "small-object", "existence",
)  # fmt: skip
EASY = "easy-vqa"
BATCH = 16
KNOBS = {"difficulty": 0.0, "clutter": 0.0}
Answers = dict[str, list[bool]]


def methods(asked: Sequence[str]) -> dict[Name, Method]:
    """Methods with one cut after the projector, at every budget."""
    names = [name for name in AFTER if name in asked]
    return {(name, keep): get_method(name)(keep=keep) for name in names for keep in KEEPS}


def elsewhere(model: Any, asked: Sequence[str], keep: float) -> dict[Name, Method]:
    """Methods that cut elsewhere, at one budget."""
    names = [name for name in ELSEWHERE if name in asked]
    return {(name, keep): method_at(name, keep, find_family(model)) for name in names}


def unmoved(asked: Sequence[str]) -> dict[Name, Method]:
    """Some methods whose survivors keep their positions, for what is asked about places."""
    found: dict[Name, Method] = {}
    for name in (name for name in UNMOVED if name in asked):
        method = get_method(name)(keep=KEEPS[0], positions="original")
        found[f"{name}, original positions", KEEPS[0]] = method
    return found


def label(name: Name) -> str:
    """A method at a budget, as the result file calls it."""
    return name[0] if name in (ALL, BLANK) else f"{name[0]} @ {name[1]:g}"


def samples_of(task: Any, batch: int) -> list[Sample]:
    """Questions of a batch of a task."""
    return [task.sample(seed, **KNOBS) for seed in range(batch * BATCH, (batch + 1) * BATCH)]


def named(found: Mapping[Name, list[bool]]) -> Answers:
    """Answers by what the result file calls a method at a budget."""
    return {label(name): right for name, right in found.items()}


def answers(
    run: Run, who: str, model: Any, processor: Any, task: Any, batch: int, asked: Sequence[str]
) -> Answers | None:
    """Right or wrong of a batch of a task; None where there was no time."""

    def make(asked: Mapping[Name, Method]) -> Answers:
        return named(ask(model, processor, samples_of(task, batch), asked))

    made: Answers | None = run.piece(f"{who}-{task.name}-{batch}", lambda: make(methods(asked)))
    still = unmoved(asked)
    if task.name != PLACES or made is None or not still:
        return made
    more: Answers | None = run.piece(f"{who}-{task.name}-unmoved-{batch}", lambda: make(still))
    return None if more is None else {**more, **made}


def load_real(folder: Path, adapter: Path) -> tuple[Any, Any]:
    """The model of real parts as it was trained, in bfloat16, and its processor."""
    if not (folder / "config.json").is_file():
        raise FoveateError(f"there is no model in {folder}; python scripts/real_parts.py vlm")
    model, processor = load_model(str(folder), "cpu", "float32")
    real_adapter.merge(model, adapter)
    return model.to(torch.bfloat16), processor


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Ask what there is time for, all tasks of a batch before the next batch."""
    run = Run(given.out, time.time() + 60 * given.minutes)
    asked: dict[str, Any] = {}
    for who in given.models:
        model, processor = load_real(given.model, given.adapter) if who == "real" else tiny.load()
        names = [n for n in given.tasks if who == "real" or n != EASY]  # which tiny cannot read
        tasks = [get_task(name, data=given.data) for name in names]
        parts: dict[str, list[Answers | None]] = {task.name: [] for task in tasks}
        for batch in range(given.batches):
            for task in tasks:
                made = answers(run, who, model, processor, task, batch, given.methods)
                parts[task.name].append(made)
        for keep in KEEPS:
            more = elsewhere(model, given.methods, keep)
            for batch, task in product(range(given.batches), tasks):
                made = parts[task.name][batch]
                found = run.piece(
                    f"{who}-{task.name}-elsewhere-{keep:g}-{batch}",
                    partial(each, model, processor, task, batch, more),
                )
                if made is not None and found is not None:
                    made.update(found)
        asked[who] = parts
    return asked


def each(model: Any, processor: Any, task: Any, batch: int, more: Mapping[Name, Method]) -> Answers:
    """Answers of a batch of a task, each method in a session of its own."""
    return named(ask_each(model, processor, samples_of(task, batch), more))


def together(asked: Mapping[str, Mapping[str, Sequence[Answers | None]]]) -> dict[str, Any]:
    """One row for each method; of drawn scenes, what both models were asked."""
    rows: dict[str, Any] = {who: {} for who in asked}
    for name in (*DRAWN, EASY):
        models = [who for who in asked if name in asked[who]]
        whole = [all(b) for b in zip(*(asked[who][name] for who in models), strict=True)]
        for who in models:
            done = [part for part, ok in zip(asked[who][name], whole, strict=True) if ok and part]
            if done:
                rows[who][name] = {
                    method: "".join(str(int(r)) for part in done for r in part[method])
                    for method in done[0]
                    if all(method in part for part in done)
                }
    return rows


def add_known(rows: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Put in the rows that a result has of the same questions and that were not asked again."""
    for who, tasks in rows.items():
        for name, methods in tasks.items():
            old = known.get(who, {}).get(name, {})
            if old.get(ALL[0]) == methods[ALL[0]]:
                tasks[name] = {**old, **methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ROOT / "build" / "real-parts" / "vlm"
    parser.add_argument("--model", type=Path, default=default, help="what real_parts.py wrote")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="what training changed")
    parser.add_argument("--data", type=Path, required=True, help="holds easy-vqa/")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "real-vlm-bench")
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} questions of a task")
    parser.add_argument("--minutes", type=float, default=600, help="when to stop")
    parser.add_argument("--tasks", default=",".join((*DRAWN, EASY)), help="what to ask")
    parser.add_argument("--models", default="tiny,real", help="which to ask")
    parser.add_argument("--methods", default=",".join((*AFTER, *ELSEWHERE)), help="which to ask")
    given = parser.parse_args()
    for name in ("models", "tasks", "methods"):
        setattr(given, name, getattr(given, name).split(","))
    if unknown := {*given.methods} - {*AFTER, *ELSEWHERE}:
        parser.error(f"these methods are not asked here: {', '.join(sorted(unknown))}")
    try:
        asked = together(measure(given))
    except FoveateError as error:
        sys.exit(f"error: {error}")
    if set(asked) != {"real", "tiny"} or set(given.tasks) != {*DRAWN, EASY}:
        sys.exit(f"kept in {given.out}; ask both models everything for a result")
    training = real_adapter.told(given.adapter)
    if RESULT.exists():
        before = json.loads(RESULT.read_text(encoding="utf-8"))
        if (before["training"], before["knobs"]) == (training, KNOBS):
            add_known(asked, before["answers"])
    result = {
        "machine": {**describe_machine(), "dtype": "bfloat16"}, "knobs": KNOBS, "keeps": KEEPS,
        "training": training, "answers": asked,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
