"""Questions about one drawn image, and about two of its objects in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from foveate.bench.sample import Evidence, Turn
from foveate.bench.tasks.base import DrawnTask, Look, Shown, apart
from foveate.tiny.questions import Question
from foveate.tiny.scenes import MIX, Scene, draw_scene
from foveate.tiny.words import COLOURS, KINDS, PLACES, SHAPES, WORDS

_WORDY = (30, 10, 20, 40)
_ONLY_SHAPES = (1, 0, 0, 0)
_COUNTS = tuple(str(n) for n in range(7))

CHOICES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLOURS),
    "shape": SHAPES,
    "number": tuple(str(n) for n in range(100)),
    "word": WORDS,
    "where": PLACES,
    "exists": ("yes", "no"),
    "count": _COUNTS,
    "relation-color": tuple(COLOURS),
    "relation-object": KINDS,
}
"""Possible answers by kind of question."""


def turn(question: Question, images: tuple[int, ...] = ()) -> Turn:
    """A turn that asks one question about the first image."""
    seen = tuple(Evidence(box) for box in question.boxes)
    return Turn(question.text, question.answer, images, seen, CHOICES[question.kind])


@dataclass(frozen=True)
class SceneTask(DrawnTask):
    """One question about one image.

    Args:
        kinds: kinds of questions, each asked equally often.
        mix: how often objects are shapes, digits, two-digit numbers and words.
        few: whether there are about half as many objects.
        scale: how many times larger everything is drawn, for models that see more than 128 pixels.
        base: edge in pixels of the image at difficulty 0, at scale 1.
        growth: pixels by which the edge grows up to difficulty 1, at scale 1, while objects keep
            their size.
    """

    kinds: tuple[str, ...]
    mix: tuple[int, int, int, int] = MIX
    few: bool = False
    scale: int = 1
    base: int = 96
    growth: int = 64

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Difficulty makes the image larger around objects of the same size, and counts higher;
        clutter sets the number of objects, 6 to 14 at one half.
        """
        return _one_question(self.kinds, rng, difficulty, self.drawer(difficulty, clutter))

    def drawer(self, difficulty: float, clutter: float) -> Callable[[int], Scene]:
        """What draws the image of a seed as the knobs say."""
        share = 0.5 if self.few else 1.0
        return lambda seed: draw_scene(
            seed,
            objects=_objects(clutter, share),
            size=self.scale * round(self.base + self.growth * difficulty),
            scale=self.scale,
            mix=self.mix,
        )


def _objects(clutter: float, share: float = 1.0) -> tuple[int, int]:
    """Fewest and most objects of an image."""
    return round((2 + 8 * clutter) * share), round((6 + 16 * clutter) * share)


def _one_question(
    kinds: tuple[str, ...], rng: Random, difficulty: float, draw: Callable[[int], Scene]
) -> Look:
    """Ask one question of a kind about the image of a seed."""
    kind = rng.choice(kinds)
    answer = _wanted(kind, rng, difficulty)

    def look(seed: int) -> Shown | None:
        scene = draw(seed)
        found = [q for q in scene.questions if q.kind == kind and answer in (None, q.answer)]
        return ((scene.image,), (turn(rng.choice(found), (0,)),)) if found else None

    return look


def _wanted(kind: str, rng: Random, difficulty: float) -> str | None:
    """The answer to look for; None where answers are many and none is common."""
    if kind in ("number", "relation-object"):
        return None
    if kind == "count":
        return rng.choice(_COUNTS[: 3 + min(4, round(8 * difficulty))])
    return rng.choice(CHOICES[kind])


@dataclass(frozen=True)
class LargeTask(DrawnTask):
    """One question about an image of many pixels, for models that see its parts.

    Args:
        edge: of the image, in pixels.
    """

    edge: int = 1024

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Difficulty shrinks the objects to a quarter, clutter adds more."""
        scale = max(1, round(self.edge / 128 * (1 - 0.75 * difficulty)))

        def draw(seed: int) -> Scene:
            return draw_scene(seed, objects=_objects(clutter), size=self.edge, scale=scale)

        return _one_question(("color", "where", "number"), rng, difficulty, draw)


class TurnsTask(SceneTask):
    """Two questions in turn about one image, the second about what the first did not ask for."""

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """The knobs are those of the tasks with one question."""
        kinds = [rng.choice(self.kinds) for _ in range(2)]
        answers = [_wanted(kind, rng, difficulty) for kind in kinds]
        draw = self.drawer(difficulty, clutter)

        def look(seed: int) -> Shown | None:
            scene = draw(seed)
            first, second = (
                [q for q in scene.questions if (q.kind, q.answer) == wanted]
                for wanted in zip(kinds, answers, strict=True)
            )
            gap = scene.image.width / 8
            pairs = [(a, b) for a in first for b in second if apart(a.boxes[0], b.boxes[0], gap)]
            if not pairs:
                return None
            a, b = rng.choice(pairs)
            return (scene.image,), (turn(a, (0,)), turn(b))

        return look


SCENE_TASKS = (
    SceneTask("attribute", "colour or shape of one object", ("color", "shape")),
    SceneTask("existence", "is there an object of a colour and a kind?", ("exists",)),
    SceneTask("counting", "how many objects have a colour?", ("count",)),
    SceneTask("position", "where in a 3x3 grid is an object?", ("where",)),
    SceneTask("relation", "what is beside an object?", ("relation-color", "relation-object")),
    SceneTask("digits", "which number is written in a colour?", ("number",)),
    SceneTask("words", "which short word is written in a colour?", ("word",), mix=_WORDY),
    SceneTask(
        "small-object",
        "colour of a shape in an image that grows from 128 to 320 pixels",
        ("color",),
        mix=_ONLY_SHAPES,
        few=True,
        base=128,
        growth=192,
    ),
    LargeTask(
        "large-image", "colour, place or number of an object in an image of 1,024 x 1,024 pixels"
    ),
    TurnsTask(
        "multi-turn",
        "two turns; the second asks about an object far from the first's",
        ("color", "shape", "where"),
    ),
)
