"""Positions of the survivors, where images or frames must be compared.

    python benchmarks/positions.py             # writes results/positions.json
    python benchmarks/positions.py --films     # writes its part on whole videos anew
    python benchmarks/quality.py               # the page

The packaged model `small` is asked the same questions twice with each method: once survivors are
numbered anew, without gaps, and once they keep the positions that they had. Methods that compare
frames are asked of `small-video`, which is the same model and is given videos whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _real_vlm import right

from foveate.bench.stats import Paired
from foveate.bench.tasks import get_task
from foveate.core import get_method
from foveate.io.writing import write_json
from foveate.measure.machine import describe_machine
from foveate.tiny import load, load_video

RESULT = Path(__file__).parent / "results" / "positions.json"
KEEP = 0.25
METHODS = tuple((name, KEEP) for name in ("random", "uniform", "divprune", "vtc-cls", "scope"))
TASKS = ("words", "multi-image", "in-context", "video-event", "video-order")
COMPARING = (("evs", 0.5), ("holitom", KEEP))  # a video has three frames, and evs keeps one whole
FILMS = ("video-event", "video-order")
ASKED, BATCH = 96, 16
WAYS = ("renumbered", "original")


def main() -> None:
    torch.set_num_threads(1)
    if "--films" in sys.argv[1:]:
        result = json.loads(RESULT.read_text())
    else:
        result = {"keep": KEEP, **compared(load(size="small"), METHODS, TASKS)}
    result["films"] = compared(load_video(size="small"), COMPARING, FILMS)
    write_json(RESULT, result, indent=1)
    print(json.dumps(result, indent=1))


def compared(
    loaded: tuple[Any, Any], methods: tuple[tuple[str, float], ...], tasks: tuple[str, ...]
) -> dict[str, Any]:
    """Right answers with all tokens, and of each method with positions of either kind.

    Args:
        loaded: model and processor.
        methods: names, and what each keeps.
        tasks: names.
    """
    answers = {task: asked(*loaded, methods, task) for task in tasks}
    rows = []
    for name, keep in methods:
        before, after = ([ok for task in tasks for ok in answers[task][name, way]] for way in WAYS)
        pair = Paired.of(before, after)
        rows.append({
            "method": name, "keep": keep,
            "change": pair.difference, "half_width": pair.half_width,
            **{way: {task: sum(answers[task][name, way]) for task in tasks} for way in WAYS},
        })  # fmt: skip
    whole = {task: sum(answers[task]["none", ""]) for task in tasks}
    return {"machine": describe_machine(), "asked": ASKED, "all": whole, "rows": rows}


def asked(
    model: Any, processor: Any, methods: tuple[tuple[str, float], ...], task: str
) -> dict[tuple[str, str], list[bool]]:
    """Whether each question of a task is answered rightly, with all tokens and each method."""
    samples = [get_task(task).sample(seed) for seed in range(ASKED)]
    batches = [samples[first : first + BATCH] for first in range(0, ASKED, BATCH)]

    def answers(method: Any) -> list[bool]:
        return [ok for batch in batches for ok in right(model, processor, batch, method)]

    found = {("none", ""): answers(None)}
    for name, keep in methods:
        for way in WAYS:
            method = get_method(name)(keep=keep, positions=way)  # type: ignore[call-arg]
            found[name, way] = answers(method)
    print(task, {name: sum(ok) for name, ok in found.items()}, flush=True)
    return found


if __name__ == "__main__":
    main()
