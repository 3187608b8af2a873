"""Drawings of the report as inline SVG: accuracy against FLOPs, and maps of survival."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from foveate.bench.summary import Line
from foveate.io.plot import Plot, Point, front_line, names, path


def label(line: Line) -> str:
    """A method and its budget: `fastv 0.25`."""
    name, keep = line.config
    return name if keep is None else f"{name} {keep:g}"


def percent(share: float | None) -> str:
    """A share as `12.3`, or a dash."""
    return "-" if share is None else f"{100 * share:.1f}"


def pareto(
    lines: Sequence[Line], front: Sequence[Line], unpruned: Line, stage: dict[str, str]
) -> str:
    """Accuracy against FLOPs, both in per cent; a line for each method, the front in bold."""
    shown = [line for line in lines if line.n and line.flops is not None]
    known = [*shown, unpruned]
    low = max(0.0, int(min(line.accuracy for line in known) * 10) / 10)
    high = min(1.0, (int(max(line.accuracy for line in known) * 10) + 1) / 10)
    left = max(0.0, int(min((line.flops or 1.0) for line in known) * 10) / 10)
    plot = Plot(
        (left, 1.02), (low, high + 0.02), "FLOPs of the prompt, % of all tokens", "accuracy, %",
        "Accuracy against FLOPs; the table below has the numbers",
    )  # fmt: skip

    def at(line: Line) -> Point:
        return plot.at(line.flops or 1.0, line.accuracy)

    series = []
    for name in dict.fromkeys(line.config[0] for line in shown):
        mine = sorted((s for s in shown if s.config[0] == name), key=lambda s: s.flops or 0)
        series.append(_series(name, mine, list(map(at, mine)), stage.get(name, "")))
    ordered = [*front, *(line for line in shown if line not in front)]
    return plot.draw(
        plot.level(unpruned.accuracy, "all tokens"),
        front_line(list(map(at, front))),
        *series,
        names(list(map(at, ordered)), list(map(label, ordered)), len(front)),
    )


def _series(name: str, lines: Sequence[Line], points: Sequence[Point], stage: str) -> str:
    kind = "baseline" if name in ("random", "uniform", "downsample") else stage
    spelled = "; ".join(
        f"{label(x)}: {percent(x.accuracy)} % accuracy, {percent(x.flops)} % of the FLOPs"
        for x in lines
    )
    dots = []
    for line, (x, y) in zip(lines, points, strict=True):
        tip = (
            f"{label(line)}: {percent(line.accuracy)} % accuracy "
            f"({percent(line.interval[0])} to {percent(line.interval[1])}), "
            f"{percent(line.flops)} % of the FLOPs, n = {line.n}"
        )
        dots.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(tip)}</title></circle>')
    return (
        f'<g class="series {kind}" tabindex="0" data-name="{escape(name)}" '
        f'aria-label="{escape(spelled)}"><path d="{path(points)}"/>{"".join(dots)}</g>'
    )


def heat_map(height: int, width: int, lifetimes: Sequence[float]) -> str:
    """How long tokens live at each cell, against the mean, and the mean of each row beside it."""
    mean = sum(lifetimes) / max(len(lifetimes), 1)
    top = max(2 * mean, 1e-6)
    cells = []
    for number, share in enumerate(lifetimes):
        row, column = divmod(number, width)
        strength = round(min(share / top, 1.0), 2)
        cells.append(
            f'<rect x="{column}" y="{row}" width="1.02" height="1.02" fill-opacity="{strength}"/>'
        )
    rows = [sum(lifetimes[r * width : (r + 1) * width]) / width for r in range(height)]
    bars = [
        f'<rect class="bar" x="{width + 0.6}" y="{r + 0.15}" height="0.7" '
        f'width="{round(5 * min(value / top, 1.0), 2)}"/>'
        for r, value in enumerate(rows)
    ]
    half = width + 0.6 + 2.5
    upper, lower = (
        sum(part) / max(len(part), 1) for part in (rows[: height // 2], rows[(height + 1) // 2 :])
    )
    spoken = f"Upper half {percent(upper)} % of layers, lower half {percent(lower)} %"
    return (
        f'<svg class="map" viewBox="-0.1 -0.1 {width + 6} {height + 0.2}" role="img" '
        f'aria-label="{spoken}"><title>{spoken}</title>'
        f'<rect class="frame" width="{width}" height="{height}"/>{"".join(cells)}{"".join(bars)}'
        f'<path class="mean" d="M{half} 0V{height}"/></svg>'
    )


def halves(height: int, width: int, lifetimes: Sequence[float]) -> tuple[float, float]:
    """Mean lifetime in the upper and in the lower half."""
    rows = [sum(lifetimes[r * width : (r + 1) * width]) / width for r in range(height)]
    upper, lower = rows[: height // 2], rows[(height + 1) // 2 :]
    return sum(upper) / max(len(upper), 1), sum(lower) / max(len(lower), 1)
