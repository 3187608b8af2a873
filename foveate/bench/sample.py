"""What a benchmark asks: images, turns about them, and where in the images the answer is.

A task draws a `Sample` from a seed. It says nothing of models: how images and turns become a
prompt, and how an answer is judged, is the runner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL.Image import Image

Box = tuple[int, int, int, int]
Split = Literal["train", "test", "hidden"]
SPLITS: tuple[Split, ...] = ("train", "test", "hidden")


@dataclass(frozen=True)
class Evidence:
    """A rectangle of pixels that holds (part of) an answer.

    Args:
        box: left, top, right, bottom in pixels of its image; right and bottom are exclusive.
        image: which of the sample's images.
        frame: which frame, where the image is a video.
    """

    box: Box
    image: int = 0
    frame: int = 0


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Args:
        question: what is asked.
        answer: the right answer.
        images: which of the sample's images stand before the question.
        evidence: what one must see to answer; empty where the answer is about absence.
        choices: answers that would be possible, the right one among them; empty where open.
        given: the answer stands in the prompt (an in-context example) and is not asked for.
    """

    question: str
    answer: str
    images: tuple[int, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    choices: tuple[str, ...] = ()
    given: bool = False


@dataclass(frozen=True)
class Sample:
    """A conversation about images.

    Args:
        task: the task's name.
        seed: the seed that it was drawn from, or its number in a data set.
        images: images in order of appearance; a video is the sequence of its frames.
        turns: questions in order; later ones are asked after the answers to earlier ones.
    """

    task: str
    seed: int
    images: tuple[Image | Sequence[Image], ...] = field(repr=False)
    turns: tuple[Turn, ...]


class Task(Protocol):
    """Draws samples.

    `name` and `summary` say what is tested; `difficulty` and `clutter` run from 0 (easiest) to 1.
    """

    @property
    def name(self) -> str:
        """Short lower-case name."""

    @property
    def summary(self) -> str:
        """One line for reports."""

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; the same arguments always give the same one, and splits share none."""
