"""Drawings of the report as inline SVG: accuracy against FLOPs, and maps of survival."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from foveate.bench.labels import place_labels
from foveate.bench.summary import Line

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 18, 46
LETTER, LINE = 6.2, 12
"""Size of a label's letters."""


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
    low = min((line.accuracy for line in [*shown, unpruned]), default=0.0)
    low = max(0.0, int(low * 10) / 10)
    best = max((line.accuracy for line in [*shown, unpruned]), default=1.0)
    high = min(1.0, (int(best * 10) + 1) / 10)
    left = max(0.0, int(min((line.flops or 1.0) for line in [*shown, unpruned]) * 10) / 10)

    def at(flops: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + (flops - left) / max(1.02 - left, 0.01) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (accuracy - low) / (high + 0.02 - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Accuracy against FLOPs; the table below has the numbers">'
    ]
    parts += _axes(at, left, low, high)
    x, y = at(left, unpruned.accuracy)
    parts.append(f'<path class="unpruned" d="M{x} {y}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="note" x="{x + 6}" y="{y - 6}">all tokens</text>')
    steps = " L".join("{} {}".format(*at(p.flops or 1.0, p.accuracy)) for p in front)
    parts.append(f'<path class="front" d="M{steps}"/>')
    names = list(dict.fromkeys(line.config[0] for line in shown))
    for name in names:
        mine = sorted((s for s in shown if s.config[0] == name), key=lambda s: s.flops or 0)
        parts.append(_series(name, mine, at, stage.get(name, "")))
    ordered = [*front, *(line for line in shown if line not in front)]
    points = [at(line.flops or 1.0, line.accuracy) for line in ordered]
    parts += _labels(ordered, points, len(front))
    return "".join([*parts, "</svg>"])


def _labels(lines: Sequence[Line], points: Sequence[tuple[float, float]], front: int) -> list[str]:
    """Labels of points, where one finds a place that covers no other label and no point.

    Args:
        lines: what is labelled, that of the front first.
        points: where they are.
        front: how many are of the front; these are bold.
    """
    texts = [label(line) for line in lines]
    frame = (LEFT, 0, WIDTH, HEIGHT - BOTTOM)
    boxes = place_labels(points, [LETTER * len(text) for text in texts], frame, LINE)
    parts: list[str] = []
    for number, (text, (x, y), box) in enumerate(zip(texts, points, boxes, strict=True)):
        if box is None:
            continue
        kind = "tag" if number < front else "tag minor"
        if abs((box[1] + box[3]) / 2 - y) > 2 * LINE:  # far away: a line says whose it is
            nearest = min(max(x, box[0]), box[2])
            parts.append(f'<path class="grid" d="M{x} {y}L{nearest:.1f} {box[3]:.1f}"/>')
        parts.append(
            f'<text class="{kind}" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(text)}</text>'
        )
    return parts


def _begins(share: float) -> str:
    """What is to be said of an axis that does not begin at zero."""
    return f"; this axis begins at {100 * share:.0f}, not at 0" if share > 0 else ""


def _axes(at, left: float, low: float, high: float) -> list[str]:  # type: ignore[no-untyped-def]
    parts = []
    for tenth in range(round(low * 10), round(high * 10) + 1, 1 if high - low < 0.6 else 2):
        x, y = at(left, tenth / 10)
        parts.append(f'<path class="grid" d="M{x} {y}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{x - 8}" y="{y + 4}" text-anchor="end">{10 * tenth}</text>'
        )
    for tenth in range(round(left * 10), 11):
        x, y = at(tenth / 10, low)
        parts.append(
            f'<text class="tick" x="{x}" y="{y + 18}" text-anchor="middle">{10 * tenth}</text>'
        )
    middle = (LEFT + WIDTH) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"FLOPs of the prompt, % of all tokens{_begins(left)}</text>"
        f'<text class="axis" transform="translate(14 {HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">accuracy, %{_begins(low)}</text>'
    )
    return parts


def _series(name: str, lines: Sequence[Line], at, stage: str) -> str:  # type: ignore[no-untyped-def]
    kind = "baseline" if name in ("random", "uniform", "downsample") else stage
    spelled = "; ".join(
        f"{label(x)}: {percent(x.accuracy)} % accuracy, {percent(x.flops)} % of the FLOPs"
        for x in lines
    )
    path = " L".join("{} {}".format(*at(x.flops or 1.0, x.accuracy)) for x in lines)
    dots = []
    for line in lines:
        x, y = at(line.flops or 1.0, line.accuracy)
        tip = (
            f"{label(line)}: {percent(line.accuracy)} % accuracy "
            f"({percent(line.interval[0])} to {percent(line.interval[1])}), "
            f"{percent(line.flops)} % of the FLOPs, n = {line.n}"
        )
        dots.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(tip)}</title></circle>')
    return (
        f'<g class="series {kind}" tabindex="0" data-name="{escape(name)}" '
        f'aria-label="{escape(spelled)}"><path d="M{path}"/>{"".join(dots)}</g>'
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
