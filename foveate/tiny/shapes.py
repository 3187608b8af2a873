"""Masks of the objects that scenes are made of: eight shapes, and numbers in Pillow's own font."""

from functools import lru_cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

from foveate.tiny.words import SHAPES

_SMOOTH = 4  # shapes are drawn this many times larger and averaged down


def _star() -> list[tuple[float, float]]:
    radii = (0.54, 0.22)
    turns = [(radii[i % 2], pi * i / 5) for i in range(10)]
    return [(0.5 + r * sin(t), 0.54 - r * cos(t)) for r, t in turns]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * pi * i / 40 for i in range(40)]
    xs = [16 * sin(t) ** 3 for t in turns]
    ys = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in turns]
    return [(0.5 + x / 34, 0.46 - y / 30) for x, y in zip(xs, ys, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)],
    "diamond": [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)],
    "cross": [
        *((0.34, 0.0), (0.66, 0.0), (0.66, 0.34), (1.0, 0.34), (1.0, 0.66), (0.66, 0.66)),
        *((0.66, 1.0), (0.34, 1.0), (0.34, 0.66), (0.0, 0.66), (0.0, 0.34), (0.34, 0.34)),
    ],
    "star": _star(),
    "heart": _heart(),
}


@lru_cache(maxsize=512)
def shape_mask(kind: str, side: int) -> Image.Image:
    """Draw one shape as a grey mask.

    Args:
        kind: a name from `SHAPES`.
        side: edge of the square the shape fills, in pixels.

    Returns:
        An "L" image of `side` x `side`; 255 is fully inside. Treat it as read-only: it is cached.
    """
    large = side * _SMOOTH
    mask = Image.new("L", (large, large), 0)
    pen = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        pen.ellipse((0, 0, large - 1, large - 1), fill=255)
        if kind == "ring":
            edge = round(0.24 * large)
            pen.ellipse((edge, edge, large - 1 - edge, large - 1 - edge), fill=0)
    else:
        pen.polygon([(x * large, y * large) for x, y in _POLYGONS[kind]], fill=255)
    return mask.reduce(_SMOOTH)


@lru_cache(maxsize=1024)
def text_mask(text: str, size: int) -> Image.Image:
    """Draw a number in Pillow's default font as a grey mask, cropped to its ink.

    Args:
        text: the characters to draw.
        size: font size in pixels; digits come out about 0.7 times as tall.

    Returns:
        An "L" image; treat it as read-only: it is cached.
    """
    font = ImageFont.load_default(size)
    mask = Image.new("L", (size * (len(text) + 1), size * 2), 0)
    ImageDraw.Draw(mask).text((2, 2), text, font=font, fill=255)
    return mask.crop(mask.getbbox())


def object_mask(kind: str, size: int) -> Image.Image:
    """Draw any kind of object: `size` is a shape's edge, or the font size of a number."""
    return shape_mask(kind, size) if kind in SHAPES else text_mask(kind, size)
