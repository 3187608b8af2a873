"""Procedural scenes: small coloured shapes and numbers at random places on a busy background.

A scene knows what it shows and where, so every question about it comes with its answer and with
the pixel boxes that hold the evidence.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

from foveate.io.images import to_rgb
from foveate.tiny.objects import Box, SceneObject
from foveate.tiny.questions import PER_KIND, Question, ask
from foveate.tiny.shapes import object_mask
from foveate.tiny.words import COLOURS, DIGITS, NUMBERS, RELATIONS, SHAPES, WORDS

GAP = 4  # free pixels between any two objects, and around the canvas
_TRIES = 40  # attempts to find room for one object

MIX = (50, 15, 35, 0)
"""How often objects are shapes, digits, two-digit numbers and words, unless told otherwise."""


@dataclass(frozen=True)
class Scene:
    """A drawn image together with everything that is true about it.

    Args:
        seed: the seed it was drawn from.
        image: the RGB image.
        objects: what is on it, in drawing order; objects never overlap.
        questions: questions with unambiguous answers.
        owner: (height, width) int8 array; which object a pixel shows, or -1 for background.
    """

    seed: int
    image: Image.Image = field(repr=False)
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...] = field(repr=False)
    owner: np.ndarray = field(repr=False, compare=False)


def draw_scene(
    seed: int,
    *,
    objects: tuple[int, int] = (6, 14),
    size: int = 128,
    background: Literal["texture"] | Image.Image = "texture",
    per_kind: int = PER_KIND,
    scale: int = 1,
    mix: tuple[int, int, int, int] = MIX,
) -> Scene:
    """Draw a scene; the same arguments always give the same scene.

    Args:
        seed: any integer.
        objects: fewest and most objects. A crowded canvas may end up with fewer than drawn.
        size: edge of the square canvas in pixels.
        background: `"texture"`, or a photo, of which a random square is cut, dimmed and used.
        per_kind: most questions of one kind.
        scale: how many times larger than usual objects are, and the distances between them.
        mix: how often objects are shapes, digits, two-digit numbers and words.

    Returns:
        The image, its objects and its questions.

    Raises:
        ValueError: if `objects` is not an increasing pair of positive numbers.
    """
    if not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"objects must be (fewest, most) with 1 <= fewest <= most, got {objects}")
    rng = Random(seed)
    canvas = _ground(background, size, rng, np.random.default_rng(seed % 2**63))
    owner = np.full((size, size), -1, np.int8)
    placed: list[SceneObject] = []
    for kind, colour, font in _cast(rng, rng.randint(*objects), mix):
        mask = object_mask(kind, font * scale)
        corner = find_room(rng, mask.size, placed, size, scale)
        if corner is not None:
            placed.append(paint(canvas, owner, len(placed), kind, colour, mask, corner, rng))
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8), "RGB")
    return Scene(seed, image, tuple(placed), ask(tuple(placed), size, rng, per_kind, scale), owner)


def _ground(
    background: Literal["texture"] | Image.Image, size: int, rng: Random, noise: np.random.Generator
) -> np.ndarray:
    if isinstance(background, Image.Image):
        return _photo(background, size, rng, noise)
    return texture(size, noise)


def _cast(rng: Random, count: int, mix: tuple[int, int, int, int]) -> list[tuple[str, str, int]]:
    """Choose kind, colour and size of every object; sometimes one colour dominates."""
    colours = list(COLOURS)
    chosen = [rng.choice(colours) for _ in range(count)]
    if rng.random() < 0.6:
        favourite = rng.choice(colours)
        for i in rng.sample(range(count), min(count, rng.randint(2, 6))):
            chosen[i] = favourite
    cast = []
    for colour in chosen:
        group = rng.choices((SHAPES, DIGITS, NUMBERS, WORDS), mix)[0]
        font = draw_font(rng, group is SHAPES)
        cast.append((rng.choice(group), colour, font))
    return cast


def draw_font(rng: Random, shape: bool) -> int:
    """Choose a size for `object_mask`, in pixels: of a shape, or of something written."""
    return rng.randint(11, 16) if shape else rng.randint(16, 20)


def find_room(
    rng: Random, extent: tuple[int, int], placed: list[SceneObject], size: int, scale: int
) -> tuple[int, int] | None:
    """Find a free corner; half of the time try beside an earlier object, to allow relations."""
    width, height = extent
    gap = GAP * scale
    for _ in range(_TRIES):
        if placed and rng.random() < 0.5:
            dx, dy = rng.choice(list(RELATIONS.values()))
            x, y = rng.choice(placed).centre
            reach, slip = scale * rng.randint(18, 36), scale * rng.randint(-4, 4)
            left = round(x + dx * reach + dy * slip - width / 2)
            top = round(y + dy * reach + dx * slip - height / 2)
        else:
            left = rng.randint(gap, size - gap - width)
            top = rng.randint(gap, size - gap - height)
        box = (left, top, left + width, top + height)
        inside = min(left, top) >= gap and max(box) <= size - gap
        if inside and not any(touch(box, other.box, gap) for other in placed):
            return left, top
    return None


def touch(a: Box, b: Box, gap: int) -> bool:
    """Whether two boxes come closer to each other than `gap` pixels in both directions."""
    apart_x = a[2] + gap <= b[0] or b[2] + gap <= a[0]
    apart_y = a[3] + gap <= b[1] or b[3] + gap <= a[1]
    return not (apart_x or apart_y)


def paint(
    canvas: np.ndarray,
    owner: np.ndarray,
    index: int,
    kind: str,
    colour: str,
    mask: Image.Image,
    corner: tuple[int, int],
    rng: Random,
) -> SceneObject:
    """Blend one object into the canvas and return its record with the box of all its ink."""
    left, top = corner
    width, height = mask.size
    window = np.s_[top : top + height, left : left + width]
    alpha = np.asarray(mask, np.float32)
    ink = np.array([c + rng.randint(-12, 12) for c in COLOURS[colour]], np.float32)
    canvas[window] += (ink - canvas[window]) * (alpha / 255)[..., None]
    owner[window][alpha >= 128] = index
    x0, y0, x1, y1 = mask.getbbox() or (0, 0, width, height)
    return SceneObject(kind, colour, (left + x0, top + y0, left + x1, top + y1))


def texture(size: int, noise: np.random.Generator) -> np.ndarray:
    """Smooth random colours plus grain, dark enough for every object colour to stand out."""
    cells = int(noise.integers(2, 8))
    base = noise.uniform(10, 70)
    coarse = (
        base + noise.uniform(0, 60, (cells, cells, 1)) + noise.uniform(-15, 15, (cells, cells, 3))
    )
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8), "RGB")
    smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return smooth + noise.normal(0, noise.uniform(1, 9), (size, size, 3)).astype(np.float32)


def _photo(photo: Image.Image, size: int, rng: Random, noise: np.random.Generator) -> np.ndarray:
    """Cut a random square out of a photo, sometimes mirrored, and dim it."""
    edge = round(min(photo.size) * rng.uniform(0.5, 1.0))
    left, top = rng.randint(0, photo.width - edge), rng.randint(0, photo.height - edge)
    cut = to_rgb(photo).resize((size, size), box=(left, top, left + edge, top + edge))
    pixels = np.asarray(cut, np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels * np.float32(rng.uniform(0.3, 0.5)) + noise.normal(0, 2, pixels.shape).astype(
        np.float32
    )
