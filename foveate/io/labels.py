"""Labels: names beside points of a picture, where they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
STEPS = 24
"""Lines above and below a point at which a label is tried."""
ROOM = 7
"""Pixels between a point and a label beside it."""


def place_labels(
    points: Sequence[tuple[float, float]], widths: Sequence[float], frame: Box, line: float
) -> list[Box | None]:
    """Find a place for each label, for the first ones first.

    Args:
        points: x and y of each, in pixels.
        widths: of the labels.
        frame: what labels must lie within.
        line: height of a label.

    Returns:
        The box of each label; `None` where no place is free.
    """
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    found = []
    for point, width in zip(points, widths, strict=True):
        free = (
            box
            for box in _places(*point, width, line)
            if _inside(box, frame) and not any(meet(box, other) for other in taken)
        )
        found.append(box := next(free, None))
        taken += [] if box is None else [box]
    return found


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _places(x: float, y: float, width: float, line: float) -> Iterator[Box]:
    """Boxes near a point, the nearest first: beside it, then above and below."""
    for step in range(STEPS):
        for dy in dict.fromkeys((-line * step, line * step)):
            for left in (x + ROOM, x - ROOM - width, x - width / 2):
                yield left, y + dy - line / 2, left + width, y + dy + line / 2


def _inside(box: Box, frame: Box) -> bool:
    left, top, right, bottom = frame
    return box[0] > left and box[1] > top and box[2] < right and box[3] < bottom
