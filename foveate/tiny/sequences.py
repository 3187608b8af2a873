"""Several images in one conversation: albums, short videos, and examples that set a rule.

Each comes with questions whose answers lie in particular images, at known boxes. The images
are drawn like the scenes, from the same objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image

from foveate.tiny.objects import Box, SceneObject
from foveate.tiny.scenes import (
    MIX,
    Scene,
    draw_font,
    draw_scene,
    find_room,
    paint,
    texture,
)
from foveate.tiny.shapes import object_mask
from foveate.tiny.words import COLOURS, DIGITS, EVENTS, NUMBERS, ORDINALS, SHAPES, WORDS

SEQUENCE_KINDS = ("in-image", "search", "which", "event", "which-event", "ends", "next", "rule")
"""Groups of questions about several images."""

_ABOUT_ONE = ("color", "shape", "number", "word", "where", "exists", "count")


@dataclass(frozen=True)
class SequenceQuestion:
    """A question about several images.

    Args:
        text: what is asked.
        answer: one word.
        kind: one of `SEQUENCE_KINDS`.
        sights: which image, and which box of pixels in it, for every piece of evidence.
    """

    text: str
    answer: str
    kind: str
    sights: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Sequence:
    """Images in order, with questions about them.

    Args:
        images: RGB images of equal size.
        objects: what each of them shows.
        questions: with unambiguous answers.
        owners: for every image a (height, width) array: which of its objects a pixel shows, or
            -1 for background.
    """

    images: tuple[Image.Image, ...] = field(repr=False)
    objects: tuple[tuple[SceneObject, ...], ...] = field(repr=False)
    questions: tuple[SequenceQuestion, ...] = field(repr=False)
    owners: tuple[np.ndarray, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Cue:
    """An object of a video before it is painted: frame by frame its box, or None while hidden."""

    kind: str
    font: int
    event: str
    colours: tuple[str | None, ...]
    corners: tuple[tuple[int, int], ...]


@dataclass
class Room:
    """Where objects stand on a square canvas, from its first frame to its last.

    Args:
        rng: of the places.
        size: edge of the canvas in pixels.
        scale: how many times larger than usual objects are.
    """

    rng: Random
    size: int
    scale: int
    taken: list[SceneObject] = field(default_factory=list)

    def reserve(self, kind: str, font: int) -> tuple[int, int] | None:
        """A corner whose area stays free in all frames, or `None` if no object fits."""
        extent = object_mask(kind, font * self.scale).size
        corner = find_room(self.rng, extent, self.taken, self.size, self.scale)
        if corner is not None:
            left, top = corner
            box = (left, top, left + extent[0], top + extent[1])
            self.taken.append(SceneObject(kind, "", box))
        return corner


_Ask = Callable[[list[Cue], list[list[tuple[int, Box]]]], list[SequenceQuestion]]


def draw_album(
    seed: int,
    images: int,
    *,
    objects: tuple[int, int] = (3, 6),
    size: int = 128,
    scale: int = 1,
    mix: tuple[int, int, int, int] = MIX,
    per_kind: int = 4,
) -> Sequence:
    """Draw separate scenes, and ask about one of them by its number, or where something is.

    Args:
        seed: any integer.
        images: how many, up to four.
        objects: fewest and most objects in an image.
        size: edge of the square images in pixels.
        scale: how many times larger than usual objects are.
        mix: how often objects are shapes, digits, two-digit numbers and words.
        per_kind: most questions of one kind about one image.
    """
    rng = Random(f"album {seed}")
    scenes = [
        draw_scene(
            rng.getrandbits(60), objects=objects, size=size, scale=scale, mix=mix, per_kind=per_kind
        )
        for _ in range(images)
    ]
    return Sequence(
        tuple(scene.image for scene in scenes),
        tuple(scene.objects for scene in scenes),
        (*_in_image(scenes), *_search(scenes), *_which(scenes)),
        tuple(scene.owner for scene in scenes),
    )


def _in_image(scenes: list[Scene]) -> list[SequenceQuestion]:
    """Questions about one scene, which they name by its number."""
    return [
        SequenceQuestion(
            f"in the {ORDINALS[n]} image {question.text}",
            question.answer,
            "in-image",
            tuple((n, box) for box in question.boxes),
        )
        for n, scene in enumerate(scenes)
        for question in scene.questions
        if question.kind in _ABOUT_ONE
    ]


def _search(scenes: list[Scene]) -> list[SequenceQuestion]:
    """Colours of objects whose kind occurs once in all images."""
    kinds = Counter(o.kind for scene in scenes for o in scene.objects)
    return [
        SequenceQuestion(f"what color is the {o.kind} ?", o.colour, "search", ((n, o.box),))
        for n, scene in enumerate(scenes)
        for o in scene.objects
        if kinds[o.kind] == 1
    ]


def _which(scenes: list[Scene]) -> list[SequenceQuestion]:
    pairs = Counter((o.colour, o.kind) for scene in scenes for o in scene.objects)
    asked = []
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            if pairs[o.colour, o.kind] == 1:
                article = "an" if o.colour == "orange" else "a"
                text = f"which image shows {article} {o.colour} {o.kind} ?"
                asked.append(SequenceQuestion(text, ORDINALS[n], "which", ((n, o.box),)))
    return asked


def draw_events(
    seed: int,
    frames: int = 3,
    *,
    objects: tuple[int, int] = (3, 6),
    size: int = 128,
    scale: int = 1,
) -> Sequence:
    """Draw a video in which something may happen to every object, and ask what.

    Args:
        seed: any integer.
        frames: how many, two or more.
        objects: fewest and most objects.
        size: edge of the square frames in pixels.
        scale: how many times larger than usual objects are.
    """
    rng = Random(f"events {seed}")
    kinds = _kinds(rng, rng.randint(*objects))
    room = Room(rng, size, scale)
    cues = [cue for kind in kinds if (cue := _cue(rng, kind, frames, room)) is not None]
    return _film(seed, cues, frames, size, scale, _happenings)


def _cue(rng: Random, kind: str, frames: int, room: Room) -> Cue | None:
    """An object to which an event happens; `None` if there is no room for it."""
    font = draw_font(rng, kind in SHAPES)
    event = rng.choice(EVENTS)
    when, before, after = rng.randint(1, frames - 1), *rng.sample(list(COLOURS), 2)
    here = room.reserve(kind, font)
    there = room.reserve(kind, font) if event == "moves" else here
    if here is None or there is None:
        return None
    early = None if event == "appears" else before
    late = {"disappears": None, "changes": after}.get(event, before)
    rest = frames - when
    return Cue(
        kind, font, event, (early,) * when + (late,) * rest, (here,) * when + (there,) * rest
    )


def _happenings(cues: list[Cue], boxes: list[list[tuple[int, Box]]]) -> list[SequenceQuestion]:
    events = Counter(cue.event for cue in cues)
    asked = []
    for cue, seen in zip(cues, boxes, strict=True):
        sights = tuple(seen)
        text = f"what happens to the {cue.kind} ?"
        asked.append(SequenceQuestion(text, cue.event, "event", sights))
        if events[cue.event] == 1 and cue.event != "stays":
            text = f"what {cue.event} ?"
            asked.append(SequenceQuestion(text, cue.kind, "which-event", sights))
    return asked


def draw_order(
    seed: int,
    frames: int = 3,
    *,
    objects: tuple[int, int] = (0, 4),
    size: int = 128,
    scale: int = 1,
) -> Sequence:
    """Draw a video with another shape in every frame, and ask for their order.

    Args:
        seed: any integer.
        frames: how many, up to eight.
        objects: fewest and most numbers that are there all the time.
        size: edge of the square frames in pixels.
        scale: how many times larger than usual objects are.
    """
    rng = Random(f"order {seed}")
    cues: list[Cue] = []
    room = Room(rng, size, scale)
    still = [(rng.choice(DIGITS + NUMBERS), None) for _ in range(rng.randint(*objects))]
    passing = list(zip(rng.sample(SHAPES, frames), range(frames), strict=True))
    for kind, frame in (*passing, *still):
        font = draw_font(rng, kind in SHAPES)
        corner = room.reserve(kind, font)
        if corner is None:
            continue
        colour = rng.choice(list(COLOURS))
        shown = tuple(colour if frame in (None, n) else None for n in range(frames))
        cues.append(
            Cue(kind, font, "stays" if frame is None else "passes", shown, (corner,) * frames)
        )
    return _film(seed, cues, frames, size, scale, _ordering)


def _ordering(cues: list[Cue], boxes: list[list[tuple[int, Box]]]) -> list[SequenceQuestion]:
    line = [(cue.kind, seen[0]) for cue, seen in zip(cues, boxes, strict=True) if len(seen) == 1]
    ends = ((line[0], "first"), (line[-1], "last"))
    asked = [
        SequenceQuestion(f"what shape comes {end} ?", kind, "ends", (sight,))
        for (kind, sight), end in ends
    ]
    for (kind, sight), (later, then) in pairwise(line):
        both = (sight, then)
        asked.append(SequenceQuestion(f"what shape comes after the {kind} ?", later, "next", both))
        asked.append(SequenceQuestion(f"what shape comes before the {later} ?", kind, "next", both))
    return asked


def draw_rule(
    seed: int,
    images: int = 2,
    *,
    objects: tuple[int, int] = (2, 4),
    size: int = 128,
    scale: int = 1,
) -> Sequence:
    """Draw images that all show one kind of shape; "it" is that kind, which nobody names.

    Every question asks for its colour in one image, in order: all but the last are examples. In
    each image the answer's colour occurs once, so that an answered example tells the kind.

    Args:
        seed: any integer.
        images: how many, two or more.
        objects: fewest and most objects in an image.
        size: edge of the square images in pixels.
        scale: how many times larger than usual objects are.
    """
    rng = Random(f"rule {seed}")
    rule, *others = rng.sample(SHAPES, len(SHAPES))
    films = []
    for _ in range(images):
        cues = _still(rng, rule, others, rng.randint(*objects), Room(rng, size, scale))
        films.append(_film(rng.getrandbits(60), cues, 1, size, scale, None))
    questions = []
    for n, film in enumerate(films):
        it = next(o for o in film.objects[0] if o.kind == rule)
        questions.append(SequenceQuestion("what color is it ?", it.colour, "rule", ((n, it.box),)))
    return Sequence(
        tuple(film.images[0] for film in films),
        tuple(film.objects[0] for film in films),
        tuple(questions),
        tuple(film.owners[0] for film in films),
    )


def _still(rng: Random, rule: str, others: list[str], count: int, room: Room) -> list[Cue]:
    """Objects of one image in drawing order: the rule's shape among others, no colour twice."""
    cast = [rule, *rng.sample(others, count - 1)]
    colours = rng.sample(list(COLOURS), count)
    cues = []
    for kind, colour in zip(cast, colours, strict=True):
        font = draw_font(rng, True)
        corner = room.reserve(kind, font)
        if corner is not None:
            cues.append(Cue(kind, font, "stays", (colour,), (corner,)))
    rng.shuffle(cues)
    return cues


def _kinds(rng: Random, count: int) -> list[str]:
    """Distinct kinds of objects, as often shapes as written."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice(rng.choices((SHAPES, DIGITS, NUMBERS, WORDS), (55, 15, 15, 15))[0])] = None
    return list(found)


def _film(
    seed: int, cues: list[Cue], frames: int, size: int, scale: int, ask: _Ask | None
) -> Sequence:
    """Paint the frames on one background; an object keeps its ink in all of them."""
    noise = np.random.default_rng(seed % 2**63)
    background = texture(size, noise)
    images, shown, owners = [], [], []
    boxes: list[list[tuple[int, Box]]] = [[] for _ in cues]
    for frame in range(frames):
        canvas, owner = background.copy(), np.full((size, size), -1, np.int8)
        there: list[SceneObject] = []
        for index, cue in enumerate(cues):
            colour = cue.colours[frame]
            if colour is not None:
                mask = object_mask(cue.kind, cue.font * scale)
                rng = Random(f"ink {seed} {index}")
                corner = cue.corners[frame]
                o = paint(canvas, owner, len(there), cue.kind, colour, mask, corner, rng)
                there.append(o)
                boxes[index].append((frame, o.box))
        images.append(Image.fromarray(canvas.clip(0, 255).astype(np.uint8), "RGB"))
        shown.append(tuple(there))
        owners.append(owner)
    questions = tuple(ask(cues, boxes)) if ask else ()
    return Sequence(tuple(images), tuple(shown), questions, tuple(owners))
