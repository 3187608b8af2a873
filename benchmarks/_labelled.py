"""A chart of points that are named beside them, as an SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foveate.io.labels import place_labels

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 640, 48, 16, 16, 52
LETTER, LINE = 7.4, 14  # pixels of a letter, and of a line


@dataclass(frozen=True)
class Point:
    """A point with its name and colour."""

    name: str
    x: float
    y: float
    colour: str


@dataclass(frozen=True)
class Scale:
    """Where values of an axis lie in pixels.

    Args:
        low: its least value.
        high: its largest.
        start: the pixel of `low`.
        end: the pixel of `high`.
    """

    low: int
    high: int
    start: int
    end: int

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    @property
    def ticks(self) -> range:
        """Its tens."""
        return range(-(-self.low // 10) * 10, self.high + 1, 10)


def scatter(
    points: Sequence[Point],
    across: tuple[int, int],
    upward: tuple[int, int],
    whole: float,
    interval: tuple[float, float],
    legend: Sequence[tuple[str, str]],
    caption: str,
) -> str:
    """An SVG of named points.

    Args:
        points: the points.
        across: least and largest value of the x axis.
        upward: the same of the y axis.
        whole: a value of y that a dashed line shows: that of all tokens.
        interval: an interval of y, as an example of how sure the points are.
        legend: colour and name of each kind of point, at the lower right.
        caption: below the x axis.
    """
    x = Scale(*across, LEFT, WIDTH - RIGHT)
    y = Scale(*upward, HEIGHT - BOTTOM, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *axes(x, y),
        f'<path d="M{LEFT} {y(whole):.1f}H{WIDTH - RIGHT}" stroke="#555555" '
        'stroke-dasharray="5 4"/>',
        f'<text x="{LEFT + 4}" y="{y(whole) - 5:.1f}">all tokens</text>',
        f'<path d="M{LEFT + 12} {y(interval[0]):.1f}V{y(interval[1]):.1f}m-4 0h8'
        f'M{LEFT + 8} {y(interval[0]):.1f}h8" stroke="#555555" fill="none"/>',
        f'<text x="{LEFT + 4}" y="{y(interval[0]) + 18:.1f}">95 % interval of a point</text>',
        *labelled([Point(p.name, x(p.x), y(p.y), p.colour) for p in points]),
    ]
    for number, (colour, name) in enumerate(reversed(legend)):
        place = HEIGHT - BOTTOM - 12 - 18 * number
        out.append(f'<circle cx="{WIDTH - 200}" cy="{place}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - 188}" y="{place + 4}">{name}</text>')
    middle = f'x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}"'
    return "\n".join([*out, f'<text {middle} text-anchor="middle">{caption}</text></svg>']) + "\n"


def axes(x: Scale, y: Scale) -> Iterator[str]:
    """Ticks of both axes, with a line at each of the y axis."""
    for value in y.ticks:
        yield f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>'
    for value in x.ticks:
        place = f'x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        yield f'<text {place} text-anchor="middle">{value}</text>'


def labelled(points: Sequence[Point]) -> Iterator[str]:
    """Points in pixels, each with its name at the nearest place that is free."""
    points = sorted(points, key=lambda p: (p.y, p.x))
    frame = (LEFT, 0, WIDTH, HEIGHT - BOTTOM)
    widths = [LETTER * len(point.name) for point in points]
    boxes = place_labels([(p.x, p.y) for p in points], widths, frame, LINE)
    for point, box in zip(points, boxes, strict=True):
        yield f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="4" fill="{point.colour}"/>'
        if box is None:
            raise ValueError(f"there is no room for the name {point.name} in the picture")
        left, top, right, _ = box
        height = top + LINE / 2
        if abs(height - point.y) > LINE / 2:
            near = min(max(point.x, left), right)
            yield (
                f'<path d="M{point.x:.1f} {point.y:.1f}L{near:.1f} {height:.1f}" '
                f'stroke="{point.colour}" stroke-width="0.6"/>'
            )
        yield f'<text x="{left:.1f}" y="{top + 11:.1f}" fill="{point.colour}">{point.name}</text>'
