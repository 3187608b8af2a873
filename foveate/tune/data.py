"""Questions of a user's own: read, and parted into those of the search and held-out ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.bench.sample import Sample, Turn
from foveate.errors import InputError
from foveate.io.images import load_image
from foveate.io.quoting import shown
from foveate.io.reading import parse_json, read_lines, reason

FEWEST = 8
"""Questions that a search needs at least, and held-out ones that a result needs."""
_WANTED = '{"image": "cat.jpg", "question": "What is this?", "answer": "cat"}'


@dataclass(frozen=True)
class Row:
    """One question about images.

    Args:
        images: their files.
        question: what is asked.
        answer: what is right; `None` where that is not known.
        choices: what the answer could be; empty where open.
    """

    images: tuple[Path, ...]
    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()

    def sample(self, number: int, max_pixels: int | None = None) -> Sample:
        """The question with its images read.

        Args:
            number: which question it is.
            max_pixels: most pixels of an image, see `foveate.io.images.load_image`.

        Raises:
            InputError: an image cannot be read.
        """
        opened = tuple(
            load_image(path, max_pixels=max_pixels, option="--max-pixels") for path in self.images
        )
        turn = Turn(
            self.question, self.answer or "", tuple(range(len(opened))), choices=self.choices
        )
        return Sample("tune", number, opened, (turn,))


def read_rows(path: Path) -> list[Row]:
    """The questions of a file.

    Args:
        path: a JSON object a line, with `question`, `image` or `images`, and where known `answer`
            and `choices`. Images are relative to its folder.

    Raises:
        InputError: it cannot be read, a line is no such object, an image is missing, or only some
            lines have an answer.
    """
    file = shown(path)
    try:
        lines = list(read_lines(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read questions from {file}: {reason(error)}") from None
    rows = [_row(line, path.parent, f"{file}:{number}") for number, line in lines]
    if not rows:
        raise InputError(f"{file} has no question; write one JSON object per line, as {_WANTED}")
    open_ones = sum(row.answer is None for row in rows)
    if 0 < open_ones < len(rows):
        raise InputError(
            f"{file}: {open_ones} of {len(rows)} questions have no `answer`; give all of them one, "
            "or none, and answers are compared with the unpruned model's"
        )
    return rows


def _row(line: str, folder: Path, where: str) -> Row:
    try:
        data: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({reason(error)}); write {_WANTED}") from None
    fields = data if isinstance(data, dict) else {}
    names = fields.get("images", [fields.get("image")])
    answer, choices = fields.get("answer"), fields.get("choices", [])
    fits = (
        isinstance(names, list)
        and names
        and all(isinstance(name, str) for name in [*names, fields.get("question")])
        and (answer is None or isinstance(answer, str))
        and isinstance(choices, list)
        and all(isinstance(choice, str) for choice in choices)
    )
    if not fits:
        raise InputError(f"{where} has no question with an image or images; write {_WANTED}")
    paths = tuple(folder / name for name in names)
    for path in paths:
        if not path.is_file():
            raise InputError(f"{where}: no such image: {shown(path)}")
    return Row(paths, fields["question"], answer, tuple(choices))


@dataclass(frozen=True)
class Split:
    """Numbers of questions.

    Args:
        search: what the search asks, in that order.
        held_out: what is asked once the recipe is chosen, and never before.
    """

    search: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], share: float, seed: int) -> Split:
        """Part questions at random; questions about one image stay on one side.

        Args:
            rows: the questions.
            share: of them that is held out.
            seed: of the draw.

        Raises:
            InputError: there are too few.
        """
        groups: dict[tuple[Path, ...], list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.images, []).append(number)
        order = list(groups.values())
        draw = random.Random(seed)
        draw.shuffle(order)
        wanted, held = round(share * len(rows)), list[int]()
        while order and len(held) < wanted:
            held += order.pop()
        search = [number for group in order for number in group]
        draw.shuffle(search)
        if min(len(search), len(held)) < FEWEST:
            raise InputError(
                f"{len(rows)} questions leave {len(search)} to search with and {len(held)} to "
                f"judge by; give {FEWEST} for each at least, and better hundreds"
            )
        return cls(tuple(search), tuple(sorted(held)))
