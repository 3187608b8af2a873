"""The figures of docs/voxels.md, from benchmarks/results/voxels.json.

python benchmarks/voxels_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "voxels.json"
PAGE = Path(__file__).parents[1] / "docs" / "voxels.md"
BEGIN, END = "<!-- voxels: begin -->\n", "<!-- voxels: end -->"
ACCURACY = ("trained", "answers", "IoU > 0.25", "IoU > 0.5", "right object", "convolution FLOPs")
LEVELS = ("answers", "stride", "scored", "kept", "generated", "added", "left")
ANSWERS = (
    ("all voxels", "all voxels"),
    ("pruned", "pruned"),
    ("pruned", "pruned, nothing added"),
    ("pruned", "all voxels"),
)


def page(old: str, result: dict[str, Any]) -> str:
    """The page with its figures made anew."""
    before, rest = old.split(BEGIN)
    return before + BEGIN + figures(result) + END + rest.split(END)[1]


def figures(result: dict[str, Any]) -> str:
    """Two tables, and what was measured."""
    used, seeds, clock = result["arguments"], result["seeds"], result["time"]
    cpu = {
        name: statistics.mean(seed[name]["training"]["cpu_s"] for seed in seeds)
        for name in ("pruned", "all voxels")
    }
    speed, each = clock["speed-up"], clock["scene_ms"]
    parts = [
        f"{result['held_out']} held-out scenes of {result['voxels']:,.0f} voxels on average; "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}; {used['steps']} steps of "
        f"{used['batch']} scenes for each arm, in {cpu['pruned']:.0f} CPU seconds with pruning and "
        f"{cpu['all voxels']:.0f} without. Shares of scenes in per cent.",
        _table(ACCURACY, [_accuracy(seeds, *pair) for pair in ANSWERS], 2),
        "Voxels of a scene in the step to each stride, on average:",
        _table(LEVELS, [row for pair in ANSWERS[:2] for row in _levels(seeds, *pair)], 1),
        f"A scene takes {each['pruned']:.0f} ms with pruning and {each['all voxels']:.0f} ms "
        f"without, backbone included: {speed['median']:.2f}x (quartiles {speed['q25']:.2f} to "
        f"{speed['q75']:.2f}), in {used['rounds']} rounds in turns. One standard error of a share "
        f"of 30 % is {100 * (0.21 / (result['held_out'] * len(seeds))) ** 0.5:.1f} points. "
        f"{result['machine']['cpu']}, torch {result['machine']['torch']}; "
        f"{result['machine']['time']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: list[list[str]], texts: int) -> str:
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _accuracy(seeds: list[dict[str, Any]], arm: str, how: str) -> list[str]:
    found = [seed[arm]["answers"][how] for seed in seeds]
    shares = [
        f"{100 * statistics.mean(one[name] for one in found):.0f}"
        for name in ("iou_25", "iou_50", "object")
    ]
    flops = statistics.mean(one["convolution_flops"] for one in found)
    return [arm, how, *shares, f"{flops / 1e6:.0f} M"]


def _levels(seeds: list[dict[str, Any]], arm: str, how: str) -> list[list[str]]:
    steps = zip(*(seed[arm]["answers"][how]["levels"] for seed in seeds), strict=True)
    return [
        [how, str(step[0]["stride"])]
        + [f"{statistics.mean(one[name] for one in step):.0f}" for name in LEVELS[2:]]
        for step in steps
    ]


def main() -> None:
    text = page(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text()))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
