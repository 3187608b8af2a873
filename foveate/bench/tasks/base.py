"""What the tasks share: seeds that splits do not share, knobs, and the baseline of guessing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from PIL.Image import Image

from foveate.bench.sample import SPLITS, Evidence, Sample, Split, Turn
from foveate.errors import BenchError
from foveate.tiny.objects import Box
from foveate.tiny.sequences import SequenceQuestion

_FIRST = {"test": 2**38, "hidden": 2**39, "train": 2**41}  # the tiny VLM trains from 2**40 on
_WIDTH = 2**38
_ATTEMPTS = 400

Shown = tuple[tuple[Image | Sequence[Image], ...], tuple[Turn, ...]]
Look = Callable[[int], Shown | None]


@dataclass(frozen=True)
class DrawnTask(ABC):
    """A task that chooses what to ask, then draws until that can be asked.

    Answers are chosen first, so that none is common.

    Args:
        name: the task's name.
        summary: what it tests.
    """

    name: str
    summary: str

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Draw a sample; `look` says what the knobs do."""
        check(split, difficulty, clutter)
        look = self.look(Random(f"{self.name} {split} {seed}"), difficulty, clutter)
        shown = next(filter(None, map(look, draws(self.name, split, seed))))
        return Sample(self.name, seed, *shown)

    @abstractmethod
    def look(self, rng: Random, difficulty: float, clutter: float) -> Look:
        """Choose what to ask.

        Returns:
            What draws the images of a seed, and asks about them; `None` where they do not show
            what is to be asked about.
        """


def check(split: Split, difficulty: float, clutter: float) -> None:
    """Refuse what no task can draw.

    Raises:
        BenchError: an unknown split, or a knob outside 0 to 1.
    """
    if split not in SPLITS:
        raise BenchError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    for name, value in (("difficulty", difficulty), ("clutter", clutter)):
        if not 0 <= value <= 1:
            raise BenchError(f"{name} must be between 0 and 1, got {value}")


def draws(task: str, split: Split, seed: int) -> Iterator[int]:
    """Seeds of images to try for a sample, until one shows what is to be asked about.

    Every split has a range of its own.

    Raises:
        BenchError: when the images run out.
    """
    for attempt in range(_ATTEMPTS):
        digest = sha256(f"{task} {split} {seed} {attempt}".encode()).digest()
        yield _FIRST[split] + int.from_bytes(digest[:8], "big") % _WIDTH
    raise BenchError(
        f"task {task!r} found nothing to ask about in {_ATTEMPTS} images for seed {seed}; "
        "lower its difficulty, or change its clutter"
    )


def evidence(question: SequenceQuestion, *, video: bool = False) -> tuple[Evidence, ...]:
    """Evidence of a question about several images, which are frames of one where `video`."""
    return tuple(Evidence(box, 0 if video else n, n if video else 0) for n, box in question.sights)


def apart(a: Box, b: Box, gap: float) -> bool:
    """Whether two boxes are at least `gap` pixels apart in x or in y."""
    across = max(a[0] - b[2], b[0] - a[2])
    down = max(a[1] - b[3], b[1] - a[3])
    return max(across, down) >= gap


def majority(samples: Iterable[Sample]) -> float:
    """Share of questions that are answered by always giving the commonest answer.

    Questions with the same choices count as one group with a commonest answer of its own, because
    the question tells which choices there are.

    Args:
        samples: of one task or of several; given turns are left out.

    Returns:
        A share in [0, 1].

    Raises:
        BenchError: if nothing is asked.
    """
    groups: dict[frozenset[str], Counter[str]] = {}
    for sample in samples:
        for turn in sample.turns:
            if not turn.given:
                groups.setdefault(frozenset(turn.choices), Counter())[turn.answer] += 1
    asked = sum(counts.total() for counts in groups.values())
    if not asked:
        raise BenchError("no question is asked in these samples")
    return sum(max(counts.values()) for counts in groups.values()) / asked
