"""Positions of the survivors, where images or frames must be compared.

    python benchmarks/positions.py     # writes results/positions.json
    python benchmarks/quality.py       # the page

The packaged model `small` is asked the same questions twice with each method: once survivors are
numbered anew, without gaps, and once they keep the positions that they had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _real_vlm import right

from foveate.bench.stats import Paired
from foveate.bench.tasks import get_task
from foveate.core import get_method
from foveate.io.writing import write_json
from foveate.measure.machine import describe_machine
from foveate.tiny import load

RESULT = Path(__file__).parent / "results" / "positions.json"
METHODS = ("random", "uniform", "divprune", "vtc-cls", "scope")
TASKS = ("words", "multi-image", "in-context", "video-event", "video-order")
ASKED, BATCH, KEEP = 96, 16, 0.25
WAYS = ("renumbered", "original")


def main() -> None:
    torch.set_num_threads(1)
    model, processor = load(size="small")
    answers: dict[str, dict[str, list[bool]]] = {}
    for task in TASKS:
        samples = [get_task(task).sample(seed) for seed in range(ASKED)]
        batches = [samples[first : first + BATCH] for first in range(0, ASKED, BATCH)]

        def asked(method: object) -> list[bool]:
            return [ok for batch in batches for ok in right(model, processor, batch, method)]  # type: ignore[arg-type] # noqa: B023

        answers[task] = {"none": asked(None)}
        for name in METHODS:
            for way in WAYS:
                method = get_method(name)(keep=KEEP, positions=way)  # type: ignore[call-arg]
                answers[task][f"{name}, {way}"] = asked(method)
        print(task, {name: sum(found) for name, found in answers[task].items()}, flush=True)
    rows = []
    for name in METHODS:
        before, after = (
            [ok for task in TASKS for ok in answers[task][f"{name}, {way}"]] for way in WAYS
        )
        pair = Paired.of(before, after)
        rows.append({
            "method": name, "change": pair.difference, "half_width": pair.half_width,
            **{way: {task: sum(answers[task][f"{name}, {way}"]) for task in TASKS} for way in WAYS},
        })  # fmt: skip
    whole = {task: sum(answers[task]["none"]) for task in TASKS}
    facts = {"machine": describe_machine(), "asked": ASKED, "keep": KEEP}
    result = {**facts, "all": whole, "rows": rows}
    write_json(RESULT, result, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
