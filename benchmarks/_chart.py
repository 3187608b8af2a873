"""What scripts share that draw: a chart of curves as an SVG, and a table within a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 340, 56, 44, 16, 24


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        low: its least value.
        high: its largest.
        ticks: values that are labelled, and the labels.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Curve:
    """A line through points, each of which may be marked."""

    colour: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def between(low: float, high: float, parts: int) -> list[float]:
    """Values from `low` to `high` in steps of one in so many parts of 1."""
    return [low + step / parts for step in range(round((high - low) * parts) + 1)]


def chart(
    curves: Sequence[Curve],
    x_axis: Axis,
    y_axis: Axis,
    legend: Sequence[tuple[str, str]],
    caption: str,
    legend_width: int,
) -> str:
    """An SVG of curves.

    Args:
        curves: the curves.
        x_axis: from left to right.
        y_axis: from below, with a line at each tick.
        legend: colour and name of each kind of curve, put at the lower right.
        caption: below the x axis.
        legend_width: of the legend in pixels.
    """

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x_axis.share(value)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * y_axis.share(value)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for value, label in y_axis.ticks:
        out.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x_axis.ticks:
        out.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{label}</text>"
        )
    for curve in curves:
        places = [(x(a), y(b)) for a, b in curve.points]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        style = f'fill="none" stroke="{curve.colour}" stroke-width="1.8"'
        out.append(f'<polyline points="{points}" {style}/>')
        if curve.marks:
            dot = f'r="3" fill="{curve.colour}"'
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" {dot}/>' for a, b in places]
    start, first = WIDTH - legend_width, HEIGHT - BOTTOM + 2 - 18 * len(legend)
    for number, (colour, name) in enumerate(legend):
        place = first + 18 * number
        out.append(
            f'<path d="M{start} {place}h24" stroke="{colour}" stroke-width="1.8"/>'
            f'<text x="{start + 32}" y="{place + 4}">{name}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{caption}</text></svg>"
    )
    return "\n".join(out) + "\n"


def with_table(text: str, begin: str, end: str, lines: Sequence[Sequence[str]]) -> str:
    """A page whose table between two marks is another: its head, how columns are set, and rows."""
    before, rest = text.split(begin)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
