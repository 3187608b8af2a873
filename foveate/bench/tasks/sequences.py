"""Questions about several images, examples in context, and videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from foveate.bench.sample import Turn
from foveate.bench.tasks.base import DrawnTask, Look, Shown, evidence
from foveate.tiny.sequences import Sequence, draw_album, draw_events, draw_order, draw_rule
from foveate.tiny.words import COLOURS, EVENTS, ORDINALS, SHAPES

Draw = Callable[[int], Sequence]


@dataclass(frozen=True)
class SequenceTask(DrawnTask):
    """A task with several images, or frames of one video.

    Args:
        scale: how many times larger everything is drawn.
    """

    scale: int = 1

    def drawer(self, draw: Callable[..., Sequence], count: int, least: float, most: float) -> Draw:
        """What draws the images of a seed.

        Args:
            draw: draws so many of them.
            count: how many.
            least: fewest objects, rounded.
            most: most objects, rounded.
        """
        objects, size = (round(least), round(most)), 128 * self.scale
        return lambda seed: draw(seed, count, objects=objects, size=size, scale=self.scale)


class AlbumTask(SequenceTask):
    """A question about one of several images."""

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Difficulty sets the number of images, two to four; clutter that of objects."""
        count = 2 + round(2 * difficulty)
        kind = rng.choice(("in-image", "which"))
        choices = tuple(COLOURS) if kind == "in-image" else ORDINALS[:count]
        answer = rng.choice(choices)
        draw = self.drawer(draw_album, count, 2 + 2 * clutter, 3 + 6 * clutter)

        def look(seed: int) -> Shown | None:
            album = draw(seed)
            found = [q for q in album.questions if (q.kind, q.answer) == (kind, answer)]
            found = [q for q in found if kind == "which" or " what color " in q.text]
            if not found:
                return None
            q = rng.choice(found)
            asked = Turn(q.text, q.answer, tuple(range(count)), evidence(q), choices)
            return album.images, (asked,)

        return look


class ContextTask(SequenceTask):
    """Answered examples set a rule that no question names: the colour of one kind of shape."""

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Two examples, one above difficulty 1/2; clutter adds other shapes."""
        answer = rng.choice(list(COLOURS))
        draw = self.drawer(draw_rule, 3 if difficulty <= 0.5 else 2, 2, 2 + 4 * clutter)

        def look(seed: int) -> Shown | None:
            drawn = draw(seed)
            right = drawn.questions[-1].answer == answer
            return (drawn.images, _lesson(drawn)) if right else None

        return look


def _lesson(drawn: Sequence) -> tuple[Turn, ...]:
    """Examples, then the question, whose evidence lies in all images."""
    *shown, last = drawn.questions
    choices = tuple(COLOURS)
    given = tuple(
        Turn(q.text, q.answer, (n,), evidence(q), choices, given=True) for n, q in enumerate(shown)
    )
    seen = tuple(item for q in drawn.questions for item in evidence(q))
    return (*given, Turn(last.text, last.answer, (len(shown),), seen, choices))


class EventTask(SequenceTask):
    """What happens to one object of a video while other things happen to others."""

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Difficulty sets the number of frames, clutter that of objects."""
        frames = _frames(difficulty)
        draw = self.drawer(draw_events, frames, 1 + 4 * clutter, 2 + 8 * clutter)
        return _film("event", EVENTS, rng, draw)


class OrderTask(SequenceTask):
    """Which shape of a video comes first or last, or before or after another."""

    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Difficulty sets the number of frames and, from 1/4 on, asks for what comes before or
        after another shape half of the time, above 3/4 always; clutter adds numbers that stay.
        """
        nexts = 0.0 if difficulty < 0.25 else 1.0 if difficulty > 0.75 else 0.5
        kind = "next" if rng.random() < nexts else "ends"
        draw = self.drawer(draw_order, _frames(difficulty), 2 * clutter, 6 * clutter)
        return _film(kind, SHAPES, rng, draw)


def _frames(difficulty: float) -> int:
    return 3 if difficulty <= 0.5 else 4


def _film(kind: str, choices: tuple[str, ...], rng: Random, draw: Draw) -> Look:
    """Ask a question of a kind about the video of a seed."""
    answer = rng.choice(choices)

    def look(seed: int) -> Shown | None:
        video = draw(seed)
        found = [q for q in video.questions if (q.kind, q.answer) == (kind, answer)]
        if not found:
            return None
        q = rng.choice(found)
        asked = Turn(q.text, q.answer, (0,), evidence(q, video=True), choices)
        return (video.images,), (asked,)

    return look


SEQUENCE_TASKS = (
    AlbumTask("multi-image", "a colour in the image of a given number, or the number of an image"),
    ContextTask(
        "in-context", "examples with images show which kind of object's colour is asked for"
    ),
    EventTask(
        "video-event",
        "does an object of a video stay, appear, disappear, move or change its colour?",
    ),
    OrderTask("video-order", "which shape of a video comes first or last, or next to another?"),
)
