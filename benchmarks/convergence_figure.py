"""Write docs/training-curves.svg and the table of docs/training.md from the result file.

python benchmarks/convergence_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from _chart import Axis, Curve, between, chart, with_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "convergence.json"
PAGE, FIGURE = ROOT / "docs" / "training.md", ROOT / "docs" / "training-curves.svg"
BEGIN, END = "<!-- table: benchmarks/convergence_figure.py -->", "<!-- end of table -->"
COLOURS = {"full": "#555555", "pyramiddrop": "#0072b2", "steep": "#d55e00"}
NAMES = {"full": "all tokens", "pyramiddrop": "PyramidDrop", "steep": "steep PyramidDrop"}
MODES = {"all tokens": "all tokens", "pruned": "PyramidDrop", "steep": "steep PyramidDrop"}


def accuracy(arm: dict[str, Any], mode: str) -> float:
    """Share of right answers to the study's own questions in per cent."""
    right, asked = arm["answers"][mode]["all"]
    return 100 * right / asked


def score(arm: dict[str, Any], mode: str) -> float:
    """FoveaBench's accuracy in per cent, over the tasks whose questions were taught."""
    right, asked = map(sum, zip(*arm["foveabench"][mode].values(), strict=True))
    return 100 * right / asked


def entry(values: list[float]) -> str:
    """Their mean, and each of them."""
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f} ({each})" if values else "-"


def table(result: dict[str, Any]) -> list[list[str]]:
    """What each arm answers in each mode: mean over seeds (the seeds), CPU seconds."""
    lines = [["trained with", "answered with", "FoveaBench", "own questions", "CPU s"]]
    lines.append(["---", "---", "---:", "---:", "---:"])
    for arm, name in NAMES.items():
        rows = [a for a in result["arms"] if a["arm"] == arm]
        for mode, label in MODES.items():
            own = [accuracy(row, mode) for row in rows if mode in row["answers"]]
            scores = [score(row, mode) for row in rows if mode in row["foveabench"]]
            if own:
                spent = mean(row["curve"][-1]["seconds"] for row in rows)
                lines.append([name, label, entry(scores), entry(own), f"{spent:.0f}"])
    return lines


def figure(result: dict[str, Any]) -> str:
    """Held-out accuracy over CPU seconds, one line per arm and seed, as an SVG."""
    arms = result["arms"]
    longest = max(a["curve"][-1]["seconds"] for a in arms)
    values = [p["accuracy"] for a in arms for p in a["curve"]]
    low, high = int(20 * min(values)) / 20, -(int(-20 * max(values)) - 1) / 20
    shown = {arm: name for arm, name in NAMES.items() if any(a["arm"] == arm for a in arms)}
    curves = [
        Curve(COLOURS[a["arm"]], [(p["seconds"], p["accuracy"]) for p in a["curve"]]) for a in arms
    ]
    minutes = [(seconds, f"{seconds}") for seconds in range(0, int(longest) + 1, 60)]
    ticks = [(value, f"{value:.0%}") for value in between(low, high, 20)]
    legend = [(COLOURS[arm], f"trained with {name}") for arm, name in shown.items()]
    caption = "CPU seconds of training after the shared start"
    return chart(curves, Axis(0, longest, minutes), Axis(low, high, ticks), legend, caption, 220)


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its table brought up to date."""
    return with_table(text, BEGIN, END, table(result))


def main() -> None:
    result = json.loads(RESULT.read_text())
    FIGURE.write_text(figure(result))
    PAGE.write_text(page(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
