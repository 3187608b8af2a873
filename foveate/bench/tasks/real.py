"""Questions about data sets that others made; they need a folder that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from foveate.bench import data as files
from foveate.bench.sample import Evidence, Sample, Split, Turn
from foveate.bench.tasks.base import check
from foveate.errors import BenchError

_NLVR = {"train": "dev", "test": "test", "hidden": "hidden"}
_PART = {"train": 0, "test": 1, "hidden": 2}
_LARGE = 0.1  # share of a photo that a category's largest box covers at least, at difficulty 0


def _folder(task: str, data: Path | None) -> Path:
    if data is None:
        raise BenchError(f"task {task!r} reads a data set; name its folder as data")
    return data


@lru_cache(maxsize=16)
def _order(task: str, split: Split, count: int) -> tuple[int, ...]:
    """Positions in random order: the first `count` seeds give every row once."""
    return tuple(Random(f"{task} {split}").sample(range(count), count))


@dataclass(frozen=True)
class NlvrTask:
    """Cornell NLVR v1.0: is a sentence true of three boxes? Its dev part serves as train.

    Args:
        data: folder with `nlvr/`.
        name: the task's name.
        summary: what it tests.
    """

    data: Path | None = None
    name: str = "nlvr"
    summary: str = "NLVR v1.0: is a human-written sentence true of a drawn picture?"

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Take an example. The knobs change nothing; every object is evidence."""
        check(split, difficulty, clutter)
        folder, part = _folder(self.name, self.data), _NLVR[split]
        rows = files.nlvr(folder, part)
        row = rows[_order(self.name, split, len(rows))[seed % len(rows)]]
        picture = files.packed_image(folder, "nlvr", part, row.image)
        seen = tuple(Evidence(box) for box in row.boxes)
        asked = Turn(row.question, row.answer, (0,), seen, ("true", "false"))
        return Sample(self.name, seed, (picture,), (asked,))


@dataclass(frozen=True)
class EasyTask:
    """easy-VQA: template questions about one shape. It has no hidden part.

    Args:
        data: folder with `easy-vqa/`.
        name: the task's name.
        summary: what it tests.
    """

    data: Path | None = None
    name: str = "easy-vqa"
    summary: str = "easy-VQA: colour, shape or presence of the one shape of a picture"

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Take a question. The knobs change nothing; the shape is the evidence."""
        check(split, difficulty, clutter)
        if split == "hidden":
            raise BenchError("task 'easy-vqa' has no hidden split; there are train and test")
        folder = _folder(self.name, self.data)
        rows = files.easy_vqa(folder, split)
        row = rows[_order(self.name, split, len(rows))[seed % len(rows)]]
        picture = files.packed_image(folder, "easy-vqa", split, row.image)
        choices = ("yes", "no") if row.answer in ("yes", "no") else ()
        seen = (Evidence(files.shape_box(picture)),)
        asked = Turn(row.question, row.answer, (0,), seen, choices)
        return Sample(self.name, seed, (picture,), (asked,))


@dataclass(frozen=True)
class CocoTask:
    """Photographs with boxes: is a category there? Every third photo belongs to a split.

    Args:
        data: folder with `coco-cc/`.
        name: the task's name.
        summary: what it tests.
    """

    data: Path | None = None
    name: str = "coco"
    summary: str = "is there a thing of a category on a photograph?"

    def sample(
        self, seed: int, *, split: Split = "test", difficulty: float = 0.5, clutter: float = 0.5
    ) -> Sample:
        """Ask about a category.

        At low difficulty only categories with a large box are asked about, if the photo has one;
        clutter changes nothing.
        """
        check(split, difficulty, clutter)
        folder = _folder(self.name, self.data)
        everything = files.coco(folder)
        photos = [photo for photo in everything[_PART[split] :: 3] if photo.things]
        if not photos:
            raise BenchError(f"{folder} has no photographs with things for the {split} split")
        photo = photos[_order(self.name, split, len(photos))[seed % len(photos)]]
        rng = Random(f"{self.name} {split} {seed}")
        there = sorted({category for category, _ in photo.things})
        absent = sorted({c for other in everything for c, _ in other.things} - set(there))
        answer = rng.choice(("yes", "no")) if absent else "yes"
        pool = _large(photo, there, _LARGE * (1 - difficulty) ** 2) if answer == "yes" else absent
        category = rng.choice(pool)
        article = "an" if category[0] in "aeiou" else "a"
        seen = tuple(Evidence(box) for name, box in photo.things if name == category)
        question = f"is there {article} {category} ?"
        asked = Turn(question, answer, (0,), seen, ("yes", "no"))
        return Sample(self.name, seed, (files.photo(folder, photo.file),), (asked,))


def _large(photo: files.Photo, categories: list[str], least: float) -> list[str]:
    """Categories with a box of at least a share of the photo; all of them if there is none."""
    pixels = least * photo.size[0] * photo.size[1]
    large = {c for c, (x0, y0, x1, y1) in photo.things if (x1 - x0) * (y1 - y0) >= pixels}
    return [category for category in categories if category in large] or categories


REAL_TASKS = (NlvrTask(), EasyTask(), CocoTask())
