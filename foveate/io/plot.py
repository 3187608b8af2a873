"""Quality against cost as inline SVG: axes that say where they begin, a front, names with room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from foveate.io.labels import place_labels

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 18, 46
LETTER, LINE = 6.2, 12
"""Size of a label's letters."""
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MOST = 11  # ticks of an axis

Point = tuple[float, float]
"""x and y of something, in pixels."""


@dataclass(frozen=True)
class Plot:
    """Shares against shares, which the axes show in per cent.

    Args:
        x: lowest and highest share across.
        y: lowest and highest share upwards.
        across: what the shares across are, for the axis.
        up: likewise upwards.
        spoken: what is said to those who do not see the drawing.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    across: str
    up: str
    spoken: str

    def at(self, x: float, y: float) -> Point:
        """Where two shares are."""
        (left, right), (low, high) = self.x, self.y
        across = (x - left) / max(right - left, 0.01) * (WIDTH - LEFT - RIGHT)
        up = (y - low) / max(high - low, 0.01) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def draw(self, *parts: str) -> str:
        """The whole drawing, what is drawn on the axes included."""
        begin = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        return begin + f'aria-label="{self.spoken}">{self._axes()}{"".join(parts)}</svg>'

    def level(self, share: float, text: str) -> str:
        """A line across at a share, with a note."""
        _, y = self.at(self.x[0], share)
        return (
            f'<path class="unpruned" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
            f'<text class="note" x="{LEFT + 6}" y="{y - 6}">{escape(text)}</text>'
        )

    def bound(self, share: float) -> str:
        """A line upwards at a share."""
        x, _ = self.at(share, self.y[0])
        return f'<path class="unpruned" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>'

    def _axes(self) -> str:
        parts = []
        for share in ticks(*self.y):
            x, y = self.at(self.x[0], share)
            parts.append(
                f'<path class="grid" d="M{x} {y}H{WIDTH - RIGHT}"/>'
                f'<text class="tick" x="{x - 8}" y="{y + 4}" text-anchor="end">{100 * share:.0f}'
                "</text>"
            )
        for share in ticks(*self.x):
            x, y = self.at(share, self.y[0])
            parts.append(
                f'<text class="tick" x="{x}" y="{y + 18}" text-anchor="middle">{100 * share:.0f}'
                "</text>"
            )
        return "".join(parts) + (
            f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{self.across}{begins(self.x[0])}</text>"
            f'<text class="axis" transform="translate(14 {HEIGHT / 2}) rotate(-90)" '
            f'text-anchor="middle">{self.up}{begins(self.y[0])}</text>'
        )


def ticks(low: float, high: float) -> list[float]:
    """The shares within a range that an axis shows: multiples of a round step."""
    step = next((s for s in STEPS if (high - low) / s < MOST), 1.0)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [number * step for number in range(first, last + 1)]


def begins(share: float) -> str:
    """What is to be said of an axis that does not begin at zero."""
    return f"; this axis begins at {100 * share:.0f}, not at 0" if share > 0 else ""


def path(points: Sequence[Point]) -> str:
    """The path through points, as attribute `d`."""
    return "M" + " L".join(f"{x} {y}" for x, y in points)


def front_line(points: Sequence[Point]) -> str:
    """The line through what nothing beats."""
    return f'<path class="front" d="{path(points)}"/>' if points else ""


def names(points: Sequence[Point], texts: Sequence[str], bold: int) -> str:
    """Labels of points, where one finds a place that covers no other label and no point.

    Args:
        points: those that are labelled, most important first, then those that are not.
        texts: the labels.
        bold: how many of the first stand out.
    """
    frame = (LEFT, 0, WIDTH, HEIGHT - BOTTOM)
    widths = [LETTER * len(text) for text in texts]
    widths += [0.0] * (len(points) - len(texts))
    boxes = place_labels(points, widths, frame, LINE)
    parts = []
    for number, (text, (x, y), box) in enumerate(zip(texts, points, boxes, strict=False)):
        if box is None:
            continue
        kind = "tag" if number < bold else "tag minor"
        if abs((box[1] + box[3]) / 2 - y) > 2 * LINE:  # far away: a line says whose it is
            nearest = min(max(x, box[0]), box[2])
            parts.append(f'<path class="grid" d="M{x} {y}L{nearest:.1f} {box[3]:.1f}"/>')
        parts.append(
            f'<text class="{kind}" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(text)}</text>'
        )
    return "".join(parts)
