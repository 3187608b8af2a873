"""The figures of docs/voxels.md, from benchmarks/results/voxels.json and voxels_short.json.

python benchmarks/voxels_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "voxels.json"
SHORT = RESULT.with_name("voxels_short.json")
PAGE = Path(__file__).parents[1] / "docs" / "voxels.md"
BEGIN, END = "<!-- voxels: begin -->\n", "<!-- voxels: end -->"
ACCURACY = ("steps", "trained", "answers", "IoU > 0.25", "IoU > 0.5", "right object", "FLOPs")
LEVELS = ("answers", "stride", "scored", "kept", "generated", "added", "left")
ANSWERS = (
    ("all voxels", "all voxels"),
    ("pruned", "pruned"),
    ("pruned", "pruned, nothing added"),
    ("pruned", "all voxels"),
)


def page(old: str, short: dict[str, Any], result: dict[str, Any]) -> str:
    """The page with its figures made anew."""
    before, rest = old.split(BEGIN)
    return before + BEGIN + figures(short, result) + END + rest.split(END)[1]


def figures(short: dict[str, Any], result: dict[str, Any]) -> str:
    """Two tables, and what was measured: accuracy of both runs, voxels and time of the longer."""
    used, seeds, clock = result["arguments"], result["seeds"], result["time"]
    cpu = {
        name: statistics.mean(seed[name]["training"]["cpu_s"] for seed in seeds)
        for name in ("pruned", "all voxels")
    }
    speed, each = clock["speed-up"], clock["scene_ms"]
    rows = [_accuracy(run, *pair) for run in (short, result) for pair in ANSWERS]
    parts = [
        f"{result['held_out']} held-out scenes of {result['voxels']:,.0f} voxels on average; "
        f"{_seeds(short)}, and {_seeds(result)}, of {used['batch']} scenes. Shares of scenes in "
        f"per cent: the mean over seeds, and the least and the most. FLOPs are those of the "
        f"convolutions for a scene. {used['steps']:,} steps took {cpu['pruned']:.0f} CPU seconds "
        f"with pruning and {cpu['all voxels']:.0f} without.",
        _table(ACCURACY, rows, 3),
        f"Voxels of a scene in the step to each stride after {used['steps']:,} steps, on average:",
        _table(LEVELS, [row for pair in ANSWERS[:2] for row in _levels(seeds, *pair)], 1),
        f"A scene takes {each['pruned']:.1f} ms with pruning and {each['all voxels']:.1f} ms "
        f"without, backbone included: {speed['median']:.2f}x (quartiles {speed['q25']:.2f} to "
        f"{speed['q75']:.2f}), in {used['rounds']} rounds in turns. {result['machine']['cpu']}, "
        f"torch {result['machine']['torch']}; {result['machine']['time']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: list[list[str]], texts: int) -> str:
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _accuracy(run: dict[str, Any], arm: str, how: str) -> list[str]:
    found = [seed[arm]["answers"][how] for seed in run["seeds"]]
    shares = [_share([one[name] for one in found]) for name in ("iou_25", "iou_50", "object")]
    flops = statistics.mean(one["convolution_flops"] for one in found)
    return [f"{run['arguments']['steps']:,}", arm, how, *shares, f"{flops / 1e6:.0f} M"]


def _seeds(run: dict[str, Any]) -> str:
    return f"{len(run['seeds'])} seeds for {run['arguments']['steps']:,} steps"


def _share(seeds: list[float]) -> str:
    return f"{100 * statistics.mean(seeds):.0f} ({100 * min(seeds):.0f} to {100 * max(seeds):.0f})"


def _levels(seeds: list[dict[str, Any]], arm: str, how: str) -> list[list[str]]:
    steps = zip(*(seed[arm]["answers"][how]["levels"] for seed in seeds), strict=True)
    return [
        [how, str(step[0]["stride"])]
        + [f"{statistics.mean(one[name] for one in step):.0f}" for name in LEVELS[2:]]
        for step in steps
    ]


def main() -> None:
    short, result = (json.loads(path.read_text()) for path in (SHORT, RESULT))
    text = page(PAGE.read_text(encoding="utf-8"), short, result)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
