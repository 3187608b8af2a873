"""Photograph and video of the gallery: objects of the embedded model's scenes over a lake at dusk.

The lake is drawn from noise, so nobody else has a right to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image

from foveate.tiny.scenes import paint
from foveate.tiny.shapes import object_mask

Plane = np.ndarray

HORIZON, SUN = 0.56, (0.68, 0.44)  # shares of the picture: a height; x and y
SKY = ((26, 38, 92), (92, 88, 160), (226, 132, 128), (255, 196, 120))  # from the top down
RIDGES = ((150, 118, 158), (104, 86, 138), (64, 60, 108), (30, 34, 66))  # from far to near

SCALE = 4  # times larger than the embedded model's scenes, which its processor undoes
LIGHT = 0.86  # of the landscape, so that objects stand out
OBJECTS = (
    ("star", "yellow", 15, (18, 17)),
    ("42", "orange", 19, (62, 20)),
    ("heart", "red", 15, (99, 30)),
    ("diamond", "cyan", 14, (38, 47)),
    ("circle", "purple", 13, (108, 65)),
    ("triangle", "green", 15, (14, 84)),
    ("ring", "cyan", 14, (57, 93)),
    ("58", "yellow", 18, (93, 102)),
)
"""Kind, colour, size, and the left and top edge, in pixels of those scenes."""
FLIGHT = ((6, 46), (26, 34), (46, 27), (66, 24), (84, 26), (99, 30))
"""Where the heart is in each frame of the video."""


def draw_photograph() -> Image.Image:
    """The scene, 512 pixels a side."""
    return _draw(draw_landscape(128 * SCALE), OBJECTS)


def draw_video() -> list[Image.Image]:
    """Frames in which the heart flies over the lake, and some of the rest stands still."""
    lake = draw_landscape(128 * SCALE)
    (heart,) = (one for one in OBJECTS if one[0] == "heart")
    still = [one for one in OBJECTS if one[0] in ("circle", "triangle", "ring", "58")]
    return [_draw(lake, [*still, (*heart[:3], at)]) for at in FLIGHT]


def _draw(
    lake: Image.Image, objects: Sequence[tuple[str, str, int, tuple[int, int]]]
) -> Image.Image:
    """Objects over the lake."""
    canvas = np.asarray(lake, np.float32) * np.float32(LIGHT)
    owner = np.full(canvas.shape[:2], -1, np.int8)
    for number, (kind, colour, size, (left, top)) in enumerate(objects):
        mask, corner = object_mask(kind, size * SCALE), (left * SCALE, top * SCALE)
        paint(canvas, owner, number, kind, colour, mask, corner, Random(number))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8), "RGB")


def noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Plane:
    """Smooth noise in [0, 1] of (height, width) with so many cells down and across."""
    coarse = Image.fromarray(rng.random(cells, np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)).clip(0, 1)


def fractal(
    shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator, octaves: int = 5
) -> Plane:
    """A sum of noises, each twice as fine and half as strong as the one before, in [0, 1]."""
    parts = [noise(shape, (cells[0] << n, cells[1] << n), rng) / 2**n for n in range(octaves)]
    total: Plane = sum(parts)
    return (total - total.min()) / (total.max() - total.min())


def draw_landscape(size: int, seed: int = 1) -> Image.Image:
    """Sky, sun, clouds, four ridges, and their reflection in a lake.

    Args:
        size: edge of the square picture in pixels.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    horizon = int(size * HORIZON)
    above = _clouds(_sky(size, horizon), rng)
    for number, colour in enumerate(RIDGES):
        above = _ridge(above, number, colour, rng)
    below = _water(above, size - horizon, rng)
    picture = np.concatenate((above, below)) * _vignette(size)
    picture += rng.normal(0, 3, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8), "RGB")


def _sky(size: int, horizon: int) -> Plane:
    """A gradient with the sun's glow."""
    stops = np.linspace(0, 1, len(SKY))
    at = np.linspace(0, 1, horizon)
    colours = np.stack([np.interp(at, stops, band) for band in np.array(SKY, float).T], -1)
    sky = np.repeat(colours[:, None], size, 1)
    y, x = np.mgrid[:horizon, :size] / size
    distance = np.hypot(x - SUN[0], y - SUN[1])
    glow = np.exp(-((distance / 0.16) ** 2))[..., None] * 0.6
    disc = (1 / (1 + np.exp((distance - 0.042) * 320)))[..., None]
    lit = sky + (np.array((255, 214, 150)) - sky) * glow
    return lit + (np.array((255, 246, 214)) - lit) * disc


def _clouds(sky: Plane, rng: np.random.Generator) -> Plane:
    """Long thin clouds, lit from below."""
    height, width = sky.shape[:2]
    cover = fractal((height, width), (6, 2), rng, 5)
    veil = ((cover - 0.5) * 2.6).clip(0, 1)[..., None] * 0.55
    lit = np.linspace(0, 1, height)[:, None, None]
    colour = (1 - lit) * np.array((122, 108, 168)) + lit * np.array((255, 176, 140))
    return sky + (colour - sky) * veil


def _ridge(
    above: Plane, number: int, colour: tuple[int, int, int], rng: np.random.Generator
) -> Plane:
    """A line of mountains; nearer ones are lower, darker and rougher."""
    height, width = above.shape[:2]
    line = fractal((1, width), (1, 3 + number), rng, 7)[0]
    top = height * (0.985 - (0.34 - 0.085 * number) * (0.25 + 0.75 * line))
    depth = (np.arange(height)[:, None] - top).clip(-1, 1) / 2 + 0.5
    grain = fractal((height, width), (24, 24), rng, 3)[..., None] * 18 - 9
    haze = np.linspace(-10, 26, height)[:, None, None] * (1 - number / 4)
    return above + (np.array(colour) + grain + haze - above) * depth[..., None]


def _water(above: Plane, height: int, rng: np.random.Generator) -> Plane:
    """The mirrored picture, moved sideways by ripples and darker towards the viewer."""
    width = above.shape[1]
    rows = np.linspace(len(above) - 1, max(len(above) - 1.3 * height, 0), height)
    near = np.linspace(0, 1, height)[:, None]
    waves = fractal((height, width), (48, 3), rng, 4) - 0.5
    across = np.arange(width) + waves * (4 + 40 * near)
    down = rows[:, None] + waves * (3 + 22 * near)
    y = down.clip(0, len(above) - 1).round().astype(int)
    x = across.clip(0, width - 1).round().astype(int)
    shine = (waves * 46 * (0.3 + near))[..., None]
    return above[y, x] * (0.86 - 0.3 * near)[..., None] + shine + np.array((4, 8, 18))


def _vignette(size: int) -> Plane:
    """Darker corners."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    return (1.04 - 0.55 * (x**2 + y**2))[..., None]
