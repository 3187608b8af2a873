"""Questions about data sets that others made; they need a folder that holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Generic, TypeVar

from PIL.Image import Image

from foveate.bench import data as files
from foveate.bench.sample import Evidence, Sample, Split, Turn
from foveate.bench.tasks.base import check
from foveate.errors import BenchError

_NLVR = {"train": "dev", "test": "test", "hidden": "hidden"}
_PART = {"train": 0, "test": 1, "hidden": 2}
_LARGE = 0.1  # share of a photo that a category's largest box covers at least, at difficulty 0

T = TypeVar("T")
Asked = tuple[Image, Turn]


@lru_cache(maxsize=16)
def _order(task: str, split: Split, count: int) -> tuple[int, ...]:
    """Positions in random order: the first `count` seeds give every row once."""
    return tuple(Random(f"{task} {split}").sample(range(count), count))


@dataclass(frozen=True)
class DataTask(ABC, Generic[T]):
    """A task that asks about the items of a data set in random order, each once in a round.

    Args:
        name: the task's name.
        summary: what it tests.
        data: folder that holds the data set's own folder.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.
    """

    name: str
    summary: str
    data: Path | None = None
    max_pixels: int | None = None

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Take an item; `ask` says what difficulty does, and clutter changes nothing."""
        check(split, difficulty, clutter)
        items = self.items(split)
        item = items[_order(self.name, split, len(items))[seed % len(items)]]
        rng = Random(f"{self.name} {split} {seed}")
        image, asked = self.ask(item, split, rng, difficulty)
        return Sample(self.name, seed, (image,), (asked,))

    @property
    def folder(self) -> Path:
        """`data`.

        Raises:
            BenchError: it was not named.
        """
        if self.data is None:
            raise BenchError(f"task {self.name!r} reads a data set; name its folder as data")
        return self.data

    @abstractmethod
    def items(self, split: Split) -> Sequence[T]:
        """What there is to ask about."""

    @abstractmethod
    def ask(self, item: T, split: Split, rng: Random, difficulty: float) -> Asked:
        """The image of an item, and a question about it."""


class NlvrTask(DataTask[files.Row]):
    """Cornell NLVR v1.0, in `nlvr/`: is a sentence true of three boxes? Its dev part is train."""

    def items(self, split: Split) -> Sequence[files.Row]:
        """Every example."""
        return files.nlvr(self.folder, _NLVR[split])

    def ask(self, item: files.Row, split: Split, rng: Random, difficulty: float) -> Asked:
        """Difficulty changes nothing; every object is evidence."""
        image = files.packed_image(self.folder, "nlvr", _NLVR[split], item.image, self.max_pixels)
        seen = tuple(Evidence(box) for box in item.boxes)
        return image, Turn(item.question, item.answer, (0,), seen, ("true", "false"))


class EasyTask(DataTask[files.Row]):
    """easy-VQA, in `easy-vqa/`: template questions about one shape. It has no hidden part."""

    def items(self, split: Split) -> Sequence[files.Row]:
        """Every question.

        Raises:
            BenchError: the split is hidden.
        """
        if split == "hidden":
            raise BenchError("task 'easy-vqa' has no hidden split; there are train and test")
        return files.easy_vqa(self.folder, split)

    def ask(self, item: files.Row, split: Split, rng: Random, difficulty: float) -> Asked:
        """Difficulty changes nothing; the shape is the evidence."""
        image = files.packed_image(self.folder, "easy-vqa", split, item.image, self.max_pixels)
        choices = ("yes", "no") if item.answer in ("yes", "no") else ()
        seen = (Evidence(files.shape_box(image)),)
        return image, Turn(item.question, item.answer, (0,), seen, choices)


class CocoTask(DataTask[files.Photo]):
    """Photographs with boxes, in `coco-cc/`: is a category there? A split has every third photo."""

    def items(self, split: Split) -> Sequence[files.Photo]:
        """The photographs of a split that show things.

        Raises:
            BenchError: there are none.
        """
        photos = [photo for photo in files.coco(self.folder)[_PART[split] :: 3] if photo.things]
        if not photos:
            raise BenchError(f"{self.folder} has no photographs with things for the {split} split")
        return photos

    def ask(self, item: files.Photo, split: Split, rng: Random, difficulty: float) -> Asked:
        """At low difficulty only categories with a large box are asked about, if there is one."""
        there = sorted({category for category, _ in item.things})
        known = {category for photo in files.coco(self.folder) for category, _ in photo.things}
        absent = sorted(known - set(there))
        answer = rng.choice(("yes", "no")) if absent else "yes"
        pool = _large(item, there, _LARGE * (1 - difficulty) ** 2) if answer == "yes" else absent
        category = rng.choice(pool)
        article = "an" if category[0] in "aeiou" else "a"
        seen = tuple(Evidence(box) for name, box in item.things if name == category)
        asked = Turn(f"is there {article} {category} ?", answer, (0,), seen, ("yes", "no"))
        return files.photo(self.folder, item.file, self.max_pixels), asked


def _large(photo: files.Photo, categories: list[str], least: float) -> list[str]:
    """Categories with a box of at least a share of the photo; all of them if there is none."""
    pixels = least * photo.size[0] * photo.size[1]
    large = {c for c, (x0, y0, x1, y1) in photo.things if (x1 - x0) * (y1 - y0) >= pixels}
    return [category for category in categories if category in large] or categories


REAL_TASKS = (
    NlvrTask("nlvr", "NLVR v1.0: is a human-written sentence true of a drawn image?"),
    EasyTask("easy-vqa", "easy-VQA: colour, shape or presence of the one shape of an image"),
    CocoTask("coco", "is there a thing of a category on a photograph?"),
)
