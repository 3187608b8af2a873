"""Questions about several pictures, examples in context, and videos."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from foveate.bench.sample import Sample, Split, Turn
from foveate.bench.tasks.base import check, draws, evidence
from foveate.tiny.sequences import (
    Sequence,
    SequenceQuestion,
    draw_album,
    draw_events,
    draw_order,
    draw_rule,
)
from foveate.tiny.words import COLOURS, EVENTS, ORDINALS, SHAPES


@dataclass(frozen=True)
class AlbumTask:
    """A question about one of several pictures.

    Args:
        name: the task's name.
        summary: what it tests.
        scale: how many times larger everything is drawn.
    """

    name: str = "multi-image"
    summary: str = "a colour in the picture of a given number, or the number of a picture"
    scale: int = 1

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; difficulty sets the number of pictures, two to four."""
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        count = 2 + round(2 * difficulty)
        kind = rng.choice(("in-image", "which"))
        choices = tuple(COLOURS) if kind == "in-image" else ORDINALS[:count]
        answer = rng.choice(choices)
        objects = (round(2 + 2 * clutter), round(3 + 6 * clutter))
        for attempt in draws(self.name, split, seed):
            album = draw_album(
                attempt, count, objects=objects, size=128 * self.scale, scale=self.scale
            )
            found = [q for q in album.questions if (q.kind, q.answer) == (kind, answer)]
            found = [q for q in found if kind == "which" or " what color " in q.text]
            if found:
                q = rng.choice(found)
                places = tuple(range(count))
                asked = Turn(q.text, q.answer, places, evidence(q), choices)
                return Sample(self.name, seed, album.pictures, (asked,))
        raise AssertionError("draws() ends with an error of its own")


@dataclass(frozen=True)
class ContextTask:
    """Answered examples set a rule that no question names: the colour of one kind of shape.

    Args:
        name: the task's name.
        summary: what it tests.
        scale: how many times larger everything is drawn.
    """

    name: str = "in-context"
    summary: str = "examples with pictures show which kind of object's colour is asked for"
    scale: int = 1

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample: two examples, one above difficulty 1/2; clutter adds other shapes."""
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        answer = rng.choice(list(COLOURS))
        count = 3 if difficulty <= 0.5 else 2
        objects = (2, round(2 + 4 * clutter))
        for attempt in draws(self.name, split, seed):
            drawn = draw_rule(
                attempt, count, objects=objects, size=128 * self.scale, scale=self.scale
            )
            if drawn.questions[-1].answer == answer:
                return Sample(self.name, seed, drawn.pictures, _lesson(drawn))
        raise AssertionError("draws() ends with an error of its own")


def _lesson(drawn: Sequence) -> tuple[Turn, ...]:
    """Examples, then the question, whose evidence lies in all pictures."""
    *shown, last = drawn.questions
    choices = tuple(COLOURS)
    given = tuple(
        Turn(q.text, q.answer, (n,), evidence(q), choices, given=True) for n, q in enumerate(shown)
    )
    seen = tuple(item for q in drawn.questions for item in evidence(q))
    return (*given, Turn(last.text, last.answer, (len(shown),), seen, choices))


@dataclass(frozen=True)
class EventTask:
    """What happens to one object of a video while other things happen to others.

    Args:
        name: the task's name.
        summary: what it tests.
        scale: how many times larger everything is drawn.
    """

    name: str = "video-event"
    summary: str = "does an object of a video stay, appear, disappear, move or change its colour?"
    scale: int = 1

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; difficulty sets the number of frames, clutter that of objects."""
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        answer = rng.choice(EVENTS)
        objects = (round(1 + 4 * clutter), round(2 + 8 * clutter))
        for attempt in draws(self.name, split, seed):
            video = draw_events(
                attempt,
                _frames(difficulty),
                objects=objects,
                size=128 * self.scale,
                scale=self.scale,
            )
            found = [q for q in video.questions if (q.kind, q.answer) == ("event", answer)]
            if found:
                return _film(self.name, seed, video, rng.choice(found), EVENTS)
        raise AssertionError("draws() ends with an error of its own")


@dataclass(frozen=True)
class OrderTask:
    """Which shape of a video comes first or last, or before or after another.

    Args:
        name: the task's name.
        summary: what it tests.
        scale: how many times larger everything is drawn.
    """

    name: str = "video-order"
    summary: str = "which shape of a video comes first or last, or next to another?"
    scale: int = 1

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample.

        Difficulty sets the number of frames and, from 1/4 on, asks for what comes before or after
        another shape half of the time, above 3/4 always; clutter adds numbers that stay.
        """
        check(split, difficulty, clutter)
        rng = Random(f"{self.name} {split} {seed}")
        nexts = 0.0 if difficulty < 0.25 else 1.0 if difficulty > 0.75 else 0.5
        kind = "next" if rng.random() < nexts else "ends"
        answer = rng.choice(SHAPES)
        objects = (round(2 * clutter), round(6 * clutter))
        for attempt in draws(self.name, split, seed):
            video = draw_order(
                attempt,
                _frames(difficulty),
                objects=objects,
                size=128 * self.scale,
                scale=self.scale,
            )
            found = [q for q in video.questions if (q.kind, q.answer) == (kind, answer)]
            if found:
                return _film(self.name, seed, video, rng.choice(found), SHAPES)
        raise AssertionError("draws() ends with an error of its own")


def _frames(difficulty: float) -> int:
    return 3 if difficulty <= 0.5 else 4


def _film(
    name: str, seed: int, video: Sequence, q: SequenceQuestion, choices: tuple[str, ...]
) -> Sample:
    asked = Turn(q.text, q.answer, (0,), evidence(q, video=True), choices)
    return Sample(name, seed, (video.pictures,), (asked,))


SEQUENCE_TASKS = (AlbumTask(), ContextTask(), EventTask(), OrderTask())
