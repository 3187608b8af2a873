"""Reads three public data sets from a folder that the user names; nothing is downloaded.

The folder holds `nlvr/`, `easy-vqa/` and `coco-cc/`: Cornell NLVR v1.0 (`dev.jsonl`,
`dev-images.zip`, and so on), easy-VQA (`train-questions.json`, `train-images.zip`, and so on), and
COCO photographs (`annotations.json`, `images/`).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.errors import BenchError, InputError
from foveate.io.images import load_image
from foveate.io.quoting import shown
from foveate.io.reading import parse_json, read_lines, read_text
from foveate.tiny.objects import Box

_BOX_STEP = 150  # pixels from one box of an NLVR image to the next
_FAR = 20  # colour distance from which on a pixel of easy-VQA belongs to the shape


@dataclass(frozen=True)
class Row:
    """One question of a data set.

    Args:
        question: as published.
        answer: as published.
        image: name of its image.
        boxes: pixel boxes of what the image shows, where the file tells them.
    """

    question: str
    answer: str
    image: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Photo:
    """A photograph and what is on it.

    Args:
        file: its name.
        things: category and box of every segment that is a thing, in pixels.
        size: width and height.
    """

    file: str
    things: tuple[tuple[str, Box], ...]
    size: tuple[int, int]


@lru_cache(maxsize=8)
def nlvr(folder: Path, part: str) -> tuple[Row, ...]:
    """Read sentences about three boxes each, true or false.

    Args:
        folder: the data folder.
        part: "dev", "test" or "hidden".

    Raises:
        BenchError: a file is missing or damaged.
    """
    path = folder / "nlvr" / f"{part}.jsonl"
    with _explained(path):
        lines = [parse_json(line) for _, line in read_lines(path)]
        return tuple(
            Row(
                line["sentence"],
                line["label"],
                f"{part}-{line['identifier']}-0.png",
                tuple(_placed(n, o) for n, box in enumerate(line["structured_rep"]) for o in box),
            )
            for line in lines
        )


def _placed(box: int, item: dict[str, Any]) -> Box:
    left, top, size = box * _BOX_STEP + item["x_loc"], item["y_loc"], item["size"]
    return left, top, left + size, top + size


@lru_cache(maxsize=8)
def easy_vqa(folder: Path, part: str) -> tuple[Row, ...]:
    """Read questions about images of one shape.

    Args:
        folder: the data folder.
        part: "train" or "test".

    Raises:
        BenchError: a file is missing or damaged.
    """
    path = folder / "easy-vqa" / f"{part}-questions.json"
    with _explained(path):
        rows = parse_json(read_text(path))
        return tuple(Row(question, answer, f"{image}.png") for question, answer, image in rows)


@lru_cache(maxsize=8)
def coco(folder: Path) -> tuple[Photo, ...]:
    """Read the list of photographs, in the order of their names.

    Raises:
        BenchError: a file is missing or damaged.
    """
    path = folder / "coco-cc" / "annotations.json"
    with _explained(path):
        photos = parse_json(read_text(path))
        read = [
            Photo(
                photo["file"],
                tuple(
                    (segment["category"], _corners(*segment["bbox"]))
                    for segment in photo["segments"]
                    if segment["isthing"]
                ),
                (photo["width"], photo["height"]),
            )
            for photo in photos
        ]
    return tuple(sorted(read, key=lambda photo: photo.file))


def _corners(left: int, top: int, width: int, height: int) -> Box:
    return left, top, left + width, top + height


def photo(folder: Path, file: str, max_pixels: int | None = None) -> Image.Image:
    """Open one photograph as RGB.

    Args:
        folder: the data folder.
        file: the photograph's name.
        max_pixels: see `foveate.io.images.load_image`.

    Raises:
        BenchError: it is missing, damaged or too large.
    """
    path = folder / "coco-cc" / "images" / file
    with _explained(path), path.open("rb") as opened:
        return load_image(opened, max_pixels=max_pixels, option="--max-pixels", name=str(path))


def packed_image(
    folder: Path, name: str, part: str, image: str, max_pixels: int | None = None
) -> Image.Image:
    """Open one image of a data set whose images are in a zip file, as RGB.

    Args:
        folder: the data folder.
        name: "nlvr" or "easy-vqa".
        part: which zip file.
        image: name inside it.
        max_pixels: see `foveate.io.images.load_image`.

    Raises:
        BenchError: it is missing, damaged or too large.
    """
    path = folder / name / f"{part}-images.zip"
    with _explained(path), zipfile.ZipFile(path) as archive:
        return load_image(
            io.BytesIO(archive.read(image)),
            max_pixels=max_pixels, option="--max-pixels", name=f"{path}/{image}",
        )  # fmt: skip


def shape_box(image: Image.Image) -> Box:
    """The box of the one shape of an easy-VQA image, which lies on a plain background."""
    pixels = np.asarray(image, np.int16)
    values, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    far = np.abs(pixels - values[counts.argmax()]).sum(-1) > _FAR
    rows, columns = (np.flatnonzero(far.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, image.width, image.height
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it."""
    try:
        yield
    except InputError as error:  # an image's: it says all
        raise BenchError(str(error)) from error
    except FileNotFoundError as error:
        raise BenchError(
            f"{shown(path, 120)} is missing; name a folder that holds it as data"
        ) from error
    except (
        ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, OSError,
    ) as error:  # fmt: skip
        raise BenchError(
            f"{shown(path, 120)} is damaged: {shown(error, 100)}; fetch it again"
        ) from error
