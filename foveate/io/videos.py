"""Opening videos: a file that PyAV decodes, or a folder of frames; some frames, evenly spread."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.errors import InputError
from foveate.io.images import load_image
from foveate.io.quoting import quoted, shown

SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip
FRAMES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of frames in a folder; other files there are no frames."""


def is_video(path: str | Path) -> bool:
    """Whether a path is a folder, or ends as a video file does."""
    return Path(path).suffix.lower() in SUFFIXES or Path(path).is_dir()


def load_video(
    path: str | Path, frames: int, *, max_pixels: int | None = None
) -> list[Image.Image]:
    """Frames of a video, in RGB, in order.

    Args:
        path: a video file, or a folder of images whose names sort by their numbers.
        frames: how many, evenly spread from the first to the last; all of a shorter video.
        max_pixels: most pixels of a frame, see `load_image`.

    Raises:
        InputError: there is no such video, it cannot be decoded or holds no frame, or PyAV is not
            installed, which files need.
    """
    if Path(path).is_dir():
        files = _files(Path(path))
        return [load_image(files[i], max_pixels=max_pixels) for i in spread(len(files), frames)]
    if not Path(path).is_file():
        raise InputError(f"no such video file: {shown(path, 100)}")
    return _decode(Path(path), frames, max_pixels)


def each_frame(
    path: str | Path, every: int = 1, *, max_pixels: int | None = None
) -> Iterator[Image.Image]:
    """The frames of a video in RGB, one after another; none is held.

    Args:
        path: as in `load_video`.
        every: every how many frames one is given, from the first.
        max_pixels: as in `load_video`.

    Raises:
        InputError: as in `load_video`, when the first frame is asked for; or `every` is no positive
            integer.
    """
    if type(every) is not int or every < 1:
        raise InputError(f"every must be a positive integer, got {quoted(every)}")
    if Path(path).is_dir():
        yield from (load_image(f, max_pixels=max_pixels) for f in _files(Path(path))[::every])
        return
    if not Path(path).is_file():
        raise InputError(f"no such video file: {shown(path, 100)}")
    av, name = _decoder(), shown(path, 100)
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise InputError(f"{name} holds no video")
            for number, frame in enumerate(file.decode(video=0)):
                _check_pixels(frame, name, max_pixels)
                if number % every == 0:
                    yield _upright(frame)
    except av.FFmpegError as error:
        raise InputError(f"cannot read {name} as a video: {shown(error, 140)}") from None


def spread(total: int, wanted: int) -> list[int]:
    """Positions of at most `wanted` of `total` frames: the first, the last, and evenly between."""
    if total <= wanted:
        return list(range(total))
    if wanted == 1:
        return [total // 2]
    return [round(i * (total - 1) / (wanted - 1)) for i in range(wanted)]


def _files(folder: Path) -> list[Path]:
    found = [file for file in folder.iterdir() if file.suffix.lower() in FRAMES]
    if not found:
        raise InputError(f"{shown(folder, 100)} is a folder without images, not a video")
    return sorted(found, key=lambda file: _by_number(file.name))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key by which `frame2` comes before `frame10`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _decoder() -> Any:
    """PyAV."""
    try:
        import av
    except ImportError:
        raise InputError(
            "video files are decoded with PyAV: pip install 'foveate[video]', or give a folder of "
            "frames"
        ) from None
    return av


def _decode(path: Path, frames: int, max_pixels: int | None) -> list[Image.Image]:
    av, name = _decoder(), shown(path, 100)
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise InputError(f"{name} holds no video")
            total = sum(1 for packet in file.demux(video=0) if packet.size)
        with av.open(str(path)) as file:
            found = list(_chosen(file, set(spread(total, frames)), name, max_pixels))
    except av.FFmpegError as error:
        raise InputError(f"cannot read {name} as a video: {shown(error, 140)}") from None
    if not found:
        raise InputError(f"{name} holds no frame that can be decoded")
    return found


def _chosen(
    file: Any, wanted: set[int], name: str, max_pixels: int | None
) -> Iterator[Image.Image]:
    """Frames of some positions, upright."""
    for number, frame in enumerate(file.decode(video=0)):
        _check_pixels(frame, name, max_pixels)
        if number in wanted:
            yield _upright(frame)
        if number >= max(wanted):
            return


def _check_pixels(frame: Any, name: str, most: int | None) -> None:
    """Refuse a frame of too many pixels.

    Raises:
        InputError: it is one.
    """
    if most is not None and frame.width * frame.height > most:
        raise InputError(
            f"{name} has frames of {frame.width * frame.height:,} pixels, more than "
            f"--max-pixels {most:,}"
        )


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as an image."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
