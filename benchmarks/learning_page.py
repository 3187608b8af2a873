"""Write docs/learning-curves.svg and the tables of docs/training.md on methods that learn.

python benchmarks/learning_page.py
"""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _chart import Axis, Curve, chart, with_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "learning.json"
PAGE, FIGURE = ROOT / "docs" / "training.md", ROOT / "docs" / "learning-curves.svg"
SCALES_BEGIN = "<!-- scales: benchmarks/learning_page.py -->"
SELECTORS_BEGIN = "<!-- selectors: benchmarks/learning_page.py -->"
OTHERS_BEGIN = "<!-- others: benchmarks/learning_page.py -->"
SCALES_END, SELECTORS_END = "<!-- end of scales -->", "<!-- end of selectors -->"
OTHERS_END = "<!-- end of others -->"
OTHERS = ("tokenflex", "ordered-queries", "covipal", "atp-llava")
COLOURS = {"m3": "#0072b2", "visionselector": "#d55e00"}
BUDGET = 0.125  # at which selectors are compared
RIVALS = 3  # methods without training that are listed


def answers(result: dict[str, Any], arm: str, mode: str) -> list[list[int]]:
    """Of each seed of an arm that was asked so, whether each question was answered right."""
    return [
        [int(sign) for signs in row["answers"][mode]["right"].values() for sign in signs]
        for name, row in result["rows"].items()
        if name.split("/")[0] == arm and mode in row["answers"]
    ]


def gain(new: list[list[int]], old: list[list[int]]) -> str:
    """Points by which the mean over seeds is better, with the 95 % interval over questions."""
    pairs = zip(zip(*new, strict=True), zip(*old, strict=True), strict=True)
    each = [100 * (mean(a) - mean(b)) for a, b in pairs]
    half = 1.96 * stdev(each) / sqrt(len(each))
    return f"{mean(each):+.1f} ({mean(each) - half:+.1f} to {mean(each) + half:+.1f})"


def percent(seeds: list[list[int]]) -> str:
    """Their mean, and each of several."""
    each = [100 * mean(right) for right in seeds]
    listed = f" ({', '.join(f'{value:.1f}' for value in each)})" if len(each) > 1 else ""
    return f"{mean(each):.1f}{listed}"


def scales(result: dict[str, Any]) -> list[list[str]]:
    """M3 beside pooling without training, scale by scale."""
    everything = answers(result, "base", "all tokens")
    lines = [
        ["tokens", "pooled, not trained", "M3", "over not trained", "over all 256, not trained"],
        ["---:"] * 5,
    ]
    for mode in next(iter(row for row in result["rows"].values() if row.get("arm") == "m3"))[
        "answers"
    ]:
        trained = answers(result, "m3", mode)
        plain = answers(result, "base", f"m3 {mode}") or everything
        count = mode.split()[0]
        over = [gain(trained, plain), gain(trained, everything)]
        lines.append([count, percent(plain), percent(trained), *over])
    return lines


def selectors(result: dict[str, Any]) -> list[list[str]]:
    """A trained selector beside the best methods that need no training."""
    lines = [
        ["at an eighth of the tokens", "accuracy", "the selector over it"],
        ["---", "---:", "---:"],
    ]
    chosen = answers(result, "visionselector", f"keep {BUDGET:g}")
    lines.append(["`visionselector`, trained at a fifth", percent(chosen), ""])
    known = [mode for mode in result["rows"]["base"]["answers"] if mode.endswith(f" {BUDGET:g}")]
    known.sort(key=lambda mode: -mean(answers(result, "base", mode)[0]))
    for mode in known[:RIVALS] + [mode for mode in known[RIVALS:] if mode.startswith("random ")]:
        right = answers(result, "base", mode)
        lines.append([f"`{mode.split()[0]}`", percent(right), gain(chosen, right)])
    return lines


def others(result: dict[str, Any]) -> list[list[str]]:
    """What was trained once, in each of its modes."""
    lines = [
        ["method", "asked with", "tokens, %", "accuracy", "CPU min"],
        ["---"] * 2 + ["---:"] * 3,
    ]
    for name, row in result["rows"].items():
        arm = name.split("/")[0]
        if arm in OTHERS:
            for mode, found in row["answers"].items():
                told = [f"`{arm}`", mode, f"{100 * found['share']:.1f}"]
                right = percent(answers(result, arm, mode))
                lines.append([*told, right, f"{row['cpu_seconds'] / 60:.0f}"])
    return lines


def figure(result: dict[str, Any]) -> str:
    """Training losses over CPU minutes, a line for each seed, as an SVG."""
    rows = [row for row in result["rows"].values() if row.get("arm") in COLOURS]
    curves = []
    for row in rows:
        minute = row["cpu_seconds"] / 60 / row["steps"]
        curves.append(
            Curve(COLOURS[row["arm"]], [(step * minute, loss) for step, loss in row["loss"]])
        )
    longest = max(point[0] for curve in curves for point in curve.points)
    most = max(point[1] for curve in curves for point in curve.points)
    minutes = [(float(minute), f"{minute}") for minute in range(0, int(longest) + 1, 5)]
    losses = [(tenth / 2, f"{tenth / 2:g}") for tenth in range(int(2 * most) + 2)]
    return chart(
        curves,
        Axis(0, longest, minutes),
        Axis(0, losses[-1][0], losses),
        [(colour, f"{arm}, one line a seed") for arm, colour in COLOURS.items()],
        "loss (mean over scales; with the selector's own) over CPU minutes of training",
        280,
    )


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its tables brought up to date."""
    text = with_table(text, SCALES_BEGIN, SCALES_END, scales(result))
    text = with_table(text, SELECTORS_BEGIN, SELECTORS_END, selectors(result))
    return with_table(text, OTHERS_BEGIN, OTHERS_END, others(result))


def main() -> None:
    result = json.loads(RESULT.read_text())
    FIGURE.write_text(figure(result))
    PAGE.write_text(page(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
