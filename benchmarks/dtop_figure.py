"""Write docs/segmentation-curve.svg and the tables of docs/segmentation.md from the result file.

python benchmarks/dtop_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dtop.json"
PAGE, FIGURE = ROOT / "docs" / "segmentation.md", ROOT / "docs" / "segmentation-curve.svg"
BEGIN, END = "<!-- table: benchmarks/dtop_figure.py -->", "<!-- end of table -->"
COLOURS = {"linear": "#0072b2", "queries": "#d55e00"}
NAMES = {"linear": "linear heads", "queries": "query heads"}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 340, 56, 44, 16, 24


def table(result: dict[str, Any]) -> str:
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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(result: dict[str, Any]) -> str:
    """MIoU over the share of FLOPs that is left, one line for each kind of head, as an SVG."""
    curves = {of["head"]: of["rows"] for of in result["results"]}
    most = {head: rows[0]["gflops"] for head, rows in curves.items()}  # at threshold 1.0
    shares = [row["gflops"] / most[head] for head, rows in curves.items() for row in rows]
    values = [row["miou"] for rows in curves.values() for row in rows]
    left, low = int(10 * min(shares)) / 10, int(50 * min(values)) / 50
    high = -(int(-50 * max(values)) - 1) / 50

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (share - left) / (1 - left)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for step in range(round((high - low) * 50) + 1):
        value = low + step / 50
        out.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{100 * value:.0f}</text>"
        )
    for step in range(round((1 - left) * 10) + 1):
        share = left + step / 10
        out.append(
            f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{share:.0%}</text>"
        )
    for head, rows in curves.items():
        places = [(x(row["gflops"] / most[head]), y(row["miou"])) for row in rows]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        colour = COLOURS[head]
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
    for number, head in enumerate(curves):
        place = HEIGHT - BOTTOM - 34 + 18 * number
        out.append(
            f'<path d="M{WIDTH - 180} {place}h24" stroke="{COLOURS[head]}" stroke-width="1.8"/>'
            f'<text x="{WIDTH - 148}" y="{place + 4}">{NAMES[head]}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        "FLOPs, as a share of those at threshold 1.0; mIoU of patches in per cent</text></svg>"
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
