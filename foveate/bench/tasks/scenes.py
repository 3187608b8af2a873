"""Questions about one drawn picture, and about two of its objects in turn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from foveate.bench.sample import Evidence, Sample, Split, Turn
from foveate.bench.tasks.base import apart, check, draws
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


def turn(question: Question, pictures: tuple[int, ...] = ()) -> Turn:
    """A turn that asks one question about the first picture."""
    seen = tuple(Evidence(box) for box in question.boxes)
    return Turn(question.text, question.answer, pictures, seen, CHOICES[question.kind])


@dataclass(frozen=True)
class SceneTask:
    """One question about one picture; the answer is chosen first, so that none is common.

    Args:
        name: the task's name.
        summary: what it tests.
        kinds: kinds of questions, each asked equally often.
        mix: how often objects are shapes, digits, two-digit numbers and words.
        few: whether there are about half as many objects.
        scale: how many times larger everything is drawn, for models that see more than 128 pixels.
        base: edge in pixels of the picture at difficulty 0, at scale 1.
        growth: pixels by which the edge grows up to difficulty 1, at scale 1, while objects keep
            their size.
    """

    name: str
    summary: str
    kinds: tuple[str, ...]
    mix: tuple[int, int, int, int] = MIX
    few: bool = False
    scale: int = 1
    base: int = 96
    growth: int = 64

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample.

        Difficulty makes the picture larger around objects of the same size, and counts higher;
        clutter sets the number of objects, 6 to 14 at one half.
        """
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        kind = rng.choice(self.kinds)
        answer = _wanted(kind, rng, difficulty)
        for attempt in draws(self.name, split, seed):
            scene = self.draw(attempt, difficulty, clutter)
            found = [q for q in scene.questions if q.kind == kind and answer in (None, q.answer)]
            if found:
                asked = turn(rng.choice(found), (0,))
                return Sample(self.name, seed, (scene.image,), (asked,))
        raise AssertionError("draws() ends with an error of its own")

    def draw(self, seed: int, difficulty: float, clutter: float) -> Scene:
        """Draw a picture as the knobs say."""
        share = 0.5 if self.few else 1.0
        low, high = (2 + 8 * clutter) * share, (6 + 16 * clutter) * share
        return draw_scene(
            seed,
            objects=(round(low), round(high)),
            size=self.scale * round(self.base + self.growth * difficulty),
            scale=self.scale,
            mix=self.mix,
        )


def _wanted(kind: str, rng: Random, difficulty: float) -> str | None:
    """The answer to look for; None where answers are many and none is common."""
    if kind in ("number", "relation-object"):
        return None
    if kind == "count":
        return rng.choice(_COUNTS[: 3 + min(4, round(8 * difficulty))])
    return rng.choice(CHOICES[kind])


@dataclass(frozen=True)
class LargeTask:
    """One question about a picture of many pixels, for models that see its parts.

    Args:
        name: the task's name.
        summary: what it tests.
        edge: of the picture, in pixels.
    """

    name: str = "large-image"
    summary: str = "colour, place or number of an object in a picture of 1,024 x 1,024 pixels"
    edge: int = 1024

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; difficulty shrinks the objects to a quarter, clutter adds more."""
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        kind = rng.choice(("color", "where", "number"))
        answer = _wanted(kind, rng, difficulty)
        scale = max(1, round(self.edge / 128 * (1 - 0.75 * difficulty)))
        for attempt in draws(self.name, split, seed):
            objects = (round(2 + 8 * clutter), round(6 + 16 * clutter))
            scene = draw_scene(attempt, objects=objects, size=self.edge, scale=scale)
            found = [q for q in scene.questions if q.kind == kind and answer in (None, q.answer)]
            if found:
                asked = turn(rng.choice(found), (0,))
                return Sample(self.name, seed, (scene.image,), (asked,))
        raise AssertionError("draws() ends with an error of its own")


@dataclass(frozen=True)
class TurnsTask:
    """Two questions in turn about one picture, the second about what the first did not ask for.

    Args:
        name: the task's name.
        summary: what it tests.
        scale: how many times larger everything is drawn.
    """

    name: str = "multi-turn"
    summary: str = "two turns; the second asks about an object far from the first's"
    scale: int = 1

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; the knobs are those of the tasks with one question."""
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        kinds = [rng.choice(("color", "shape", "where")) for _ in range(2)]
        answers = [_wanted(kind, rng, difficulty) for kind in kinds]
        drawer = SceneTask(self.name, self.summary, tuple(kinds), scale=self.scale)
        for attempt in draws(self.name, split, seed):
            scene = drawer.draw(attempt, difficulty, clutter)
            first, second = (
                [q for q in scene.questions if (q.kind, q.answer) == wanted]
                for wanted in zip(kinds, answers, strict=True)
            )
            gap = scene.image.width / 8
            pairs = [(a, b) for a in first for b in second if apart(a.boxes[0], b.boxes[0], gap)]
            if pairs:
                a, b = rng.choice(pairs)
                return Sample(self.name, seed, (scene.image,), (turn(a, (0,)), turn(b)))
        raise AssertionError("draws() ends with an error of its own")


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
        "colour of a shape in a picture that grows from 128 to 320 pixels",
        ("color",),
        mix=_ONLY_SHAPES,
        few=True,
        base=128,
        growth=192,
    ),
    LargeTask(),
    TurnsTask(),
)
