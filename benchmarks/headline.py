"""Headline cells of docs/results.md: the methods that papers compare with most, on many questions.

python benchmarks/headline.py OUT             # asks; again, it goes on where it was stopped
python benchmarks/headline.py OUT --parts 6   # asks more: parts are pooled
python benchmarks/headline.py OUT --parts 0   # asks nothing, and pools what was asked
python benchmarks/quality.py                  # writes the page
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.bench import campaign
from foveate.bench.duels import duels
from foveate.bench.judge import majority
from foveate.bench.levels import ALL
from foveate.bench.runner import Runner
from foveate.bench.settings import Settings, cells
from foveate.bench.store import Row, Store
from foveate.bench.summary import Line, Summary
from foveate.loading import load_model

METHODS = (
    "fastv", "sparsevlm", "pyramiddrop", "visionzip", "llava-prumerge", "divprune", "cdpruner",
    "dart",
)  # fmt: skip
KEEPS = (0.25, 0.125)
SAMPLES = 32  # of each task in a part
RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "headline.json"
TASKS = tuple(
    task["name"]
    for task in json.loads((RESULTS / "quality.json").read_text())["tasks"]
    if task["telling"]
)
"""Those on which the unpruned model was clearly better than the most common answer."""


def settings(part: int) -> Settings:
    """What a part asks: no question of another part."""
    return Settings("tiny", METHODS, KEEPS, TASKS, samples=SAMPLES, seed=SAMPLES * part)


def ask(out: Path, parts: int) -> None:
    """Ask the questions of some parts; a part that was asked before costs nothing."""
    torch.set_num_threads(1)
    model, processor = load_model("tiny", "cpu", "auto")
    store = Store(out / "results.parquet")
    with store.writing():
        for part in range(parts):
            start = time.monotonic()
            runner = Runner(model, processor, settings(part), campaign.find_task)
            campaign.execute(
                settings(part), runner, store, load=load_model, command="headline.py"
            )  # fmt: skip
            print(f"part {part + 1}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def pool(rows: Sequence[Row]) -> dict[str, Any]:
    """What the page needs of all parts of which every cell is done.

    Args:
        rows: of the results file; those that other code measured than the last one do not count.

    Raises:
        SystemExit: no part is complete.
    """
    latest = rows[-1]
    rows = [r for r in rows if r["versions"] == latest["versions"] and r["status"] == "done"]
    wanted = len(list(cells(settings(0))))
    seeds = sorted({r["seed"] for r in rows})
    whole = [s for s in seeds if sum(r["seed"] == s for r in rows) == wanted]
    if not whole:
        raise SystemExit("no part is complete; run again to go on")
    parts = [r for r in rows if r["seed"] in whole]
    # A task of a part counts as a task of its own, so that its questions meet their like.
    summary = Summary([{**r, "task": f"{r['task']} from {r['seed']}"} for r in parts], {})
    everything = [task.name for task in summary.tasks]
    facts = {k: latest[k] for k in ("machine", "versions", "fingerprint")}
    return {
        "what": "headline cells", **facts, "dtype": "float32", "threads": 1,
        "finished": max(r["finished"] for r in parts), "samples": SAMPLES, "seeds": whole,
        "seconds": round(sum(r["seconds"] for r in parts)),
        "tasks": [_task(name, parts) for name in TASKS],
        "lines": [_line(summary.line(config, everything)) for config in summary.configs],
        "pairs": [
            {"keep": keep, **duel.to_dict()}
            for keep in KEEPS
            for duel in duels(summary, keep, everything)
        ],
    }  # fmt: skip


def _task(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    mine = [r for r in rows if r["task"] == name]
    asked = [a for r in mine if r["method"] == ALL for a in r["answers"]]
    right: dict[str, int] = {}
    for row in mine:
        config = row["method"] if row["keep"] is None else f"{row['method']} {row['keep']:g}"
        right[config] = right.get(config, 0) + row["right"]
    return {
        "name": name, "n": len(asked), "majority": majority([a["answer"] for a in asked]),
        "right": right,
    }  # fmt: skip


def _line(line: Line) -> dict[str, Any]:
    names = ("n", "accuracy", "interval", "agreement", "kl", "recall", "tokens", "flops")
    pair = line.paired
    return {
        "method": line.config[0], "keep": line.config[1],
        **{name: getattr(line, name) for name in names},
        "change": pair.difference, "half_width": pair.half_width,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", type=int, default=5, help=f"of {SAMPLES} samples of each task")
    given = parser.parse_args()
    if given.parts:
        ask(given.out, given.parts)
    result = pool(Store(given.out / "results.parquet").rows)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
