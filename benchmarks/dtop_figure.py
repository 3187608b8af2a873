"""Write docs/segmentation-curve.svg and the tables of docs/segmentation.md from the result file.

python benchmarks/dtop_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _chart import Axis, Curve, between, chart, with_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dtop.json"
PAGE, FIGURE = ROOT / "docs" / "segmentation.md", ROOT / "docs" / "segmentation-curve.svg"
BEGIN, END = "<!-- table: benchmarks/dtop_figure.py -->", "<!-- end of table -->"
COLOURS = {"linear": "#0072b2", "queries": "#d55e00"}
NAMES = {"linear": "linear heads", "queries": "query heads"}


def table(result: dict[str, Any]) -> list[list[str]]:
    """A row for each threshold of each kind of head."""
    lines = [["heads", "threshold", "mIoU", "GFLOPs", "left early", "speed-up, batch of 16"]]
    lines.append(["---", "---:", "---:", "---:", "---:", "---:"])
    for of in result["results"]:
        for row in of["rows"]:
            left = " + ".join(f"{share:.0%}" for share in row["left"])
            fast = row["speed-up"]
            spread = f"{fast['median']:.2f}x ({fast['q25']:.2f} to {fast['q75']:.2f})"
            miou, gflops = f"{100 * row['miou']:.1f}", f"{row['gflops']:.3f}"
            lines.append([of["head"], f"{row['threshold']}", miou, gflops, left, spread])
    return lines


def figure(result: dict[str, Any]) -> str:
    """MIoU over the share of FLOPs that is left, one line for each kind of head, as an SVG."""
    curves = {of["head"]: of["rows"] for of in result["results"]}
    most = {head: rows[0]["gflops"] for head, rows in curves.items()}  # at threshold 1.0
    shares = [row["gflops"] / most[head] for head, rows in curves.items() for row in rows]
    values = [row["miou"] for rows in curves.values() for row in rows]
    left, low = int(10 * min(shares)) / 10, int(50 * min(values)) / 50
    high = -(int(-50 * max(values)) - 1) / 50
    lines = [
        Curve(
            COLOURS[head], [(row["gflops"] / most[head], row["miou"]) for row in rows], marks=True
        )
        for head, rows in curves.items()
    ]
    tenths = [(share, f"{share:.0%}") for share in between(left, 1, 10)]
    ticks = [(value, f"{100 * value:.0f}") for value in between(low, high, 50)]
    legend = [(COLOURS[head], NAMES[head]) for head in curves]
    caption = "FLOPs, as a share of those at threshold 1.0; mIoU of patches in per cent"
    return chart(lines, Axis(left, 1, tenths), Axis(low, high, ticks), legend, caption, 180)


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its table brought up to date."""
    return with_table(text, BEGIN, END, table(result))


def main() -> None:
    result = json.loads(RESULT.read_text())
    FIGURE.write_text(figure(result))
    PAGE.write_text(page(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
