"""Write docs/training-curves.svg and the table of docs/training.md from the result file.

python benchmarks/convergence_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "convergence.json"
PAGE, FIGURE = ROOT / "docs" / "training.md", ROOT / "docs" / "training-curves.svg"
BEGIN, END = "<!-- table: benchmarks/convergence_figure.py -->", "<!-- end of table -->"
COLOURS = {"full": "#555555", "pyramiddrop": "#0072b2", "steep": "#d55e00"}
NAMES = {"full": "all tokens", "pyramiddrop": "PyramidDrop", "steep": "steep PyramidDrop"}
MODES = {"all tokens": "all tokens", "pruned": "PyramidDrop", "steep": "steep PyramidDrop"}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 340, 56, 44, 16, 16


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


def table(result: dict[str, Any]) -> str:
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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(result: dict[str, Any]) -> str:
    """Held-out accuracy over CPU seconds, one line per arm and seed, as an SVG."""
    arms = result["arms"]
    longest = max(a["curve"][-1]["seconds"] for a in arms)
    values = [p["accuracy"] for a in arms for p in a["curve"]]
    low, high = int(20 * min(values)) / 20, -(int(-20 * max(values)) - 1) / 20

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / longest

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for step in range(round((high - low) * 20) + 1):
        value = low + step / 20
        out.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>'
        )
    for seconds in range(0, int(longest) + 1, 60):
        out.append(
            f'<text x="{x(seconds):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{seconds}</text>"
        )
    for arm in arms:
        points = " ".join(f"{x(p['seconds']):.1f},{y(p['accuracy']):.1f}" for p in arm["curve"])
        colour = COLOURS[arm["arm"]]
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )
    shown = {arm: name for arm, name in NAMES.items() if any(a["arm"] == arm for a in arms)}
    for number, (arm, name) in enumerate(shown.items()):
        place = HEIGHT - BOTTOM - 52 + 18 * number
        out.append(
            f'<path d="M{WIDTH - 220} {place}h24" stroke="{COLOURS[arm]}" stroke-width="1.8"/>'
            f'<text x="{WIDTH - 188}" y="{place + 4}">trained with {name}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        "CPU seconds of training after the shared start</text></svg>"
    )
    return "\n".join(out) + "\n"


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its table brought up to date."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    result = json.loads(RESULT.read_text())
    FIGURE.write_text(figure(result))
    PAGE.write_text(page(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
