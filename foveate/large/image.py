"""Images that are read by windows, so that one of any size needs little memory.

A `LargeImage` gives windows of itself, reduced by a power of two; `read_tile` makes the tiles of a
pyramid's levels from them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from foveate.errors import FoveateError, InputError
from foveate.io.images import as_rgb, load_image, value_range
from foveate.io.quoting import shown
from foveate.large.pyramid import Level, Size

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are exclusive."""

_OVERVIEW = 2**22  # pixels of the reduced copy that a stored image keeps
_BAND = 2**24  # pixels that are read at once where every pixel is sampled by itself
_MARGIN = 3  # pixels around a window that its interpolation looks at


class LargeImage(Protocol):
    """An image of which windows can be read."""

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""

    def window(self, box: Box, reduce: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a box.

        Args:
            box: in pixels of the reduced image, which has ceil(side / reduce) pixels a side.
            reduce: a power of two; every pixel is the mean of `reduce` x `reduce` pixels.
        """


class Held:
    """An image in memory.

    Args:
        image: any mode; `foveate.io.images` says how it becomes RGB.
    """

    def __init__(self, image: Image.Image) -> None:
        self._image = as_rgb(image)

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self._image.height, self._image.width

    def window(self, box: Box, reduce: int) -> np.ndarray:
        """A box of the reduced image; see `LargeImage`."""
        left, top, right, bottom = (edge * reduce for edge in box)
        height, width = self.size
        full = (left, top, min(right, width), min(bottom, height))
        part = self._image.reduce(reduce, full) if reduce > 1 else self._image.crop(full)
        return np.asarray(part)


class Stored:
    """An image in a file, of which only windows and a small overview come into memory.

    Tiled TIFF is read tile by tile, with its stored reductions if it has some; what a format cannot
    give by windows libvips unpacks once into a temporary file.

    Colours are those of `foveate.io.images`, but for CMYK, which libvips converts with a profile.
    Where the range of values decides (floats, whole numbers of neither 8 nor 16 bits), the file is
    read once more to know it.

    Args:
        path: any file that libvips reads.

    Raises:
        FoveateError: pyvips is not installed.
        InputError: libvips cannot read the file, now or when a window of it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self._vips = _pyvips()
        self._path = str(path)
        self._range: tuple[float, float] | None = None
        with self._explained():
            self._image = self._open()
            reductions = self._reductions()
        self._stored = {1: self._image, **reductions}
        pages = self._image.get("n-pages") if self._image.get_typeof("n-pages") else 1
        if pages > 1 and not reductions:
            warnings.warn(
                f"{shown(path, 100)} holds several images (an animation, or pages); "
                "only the first is used",
                stacklevel=2,
            )

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self._image.height, self._image.width

    def window(self, box: Box, reduce: int) -> np.ndarray:
        """A box of the reduced image; see `LargeImage`."""
        factor, image = max(
            ((f, i) for f, i in self._stored.items() if f <= reduce), key=lambda item: item[0]
        )
        if reduce >= self._overview[0] > factor:
            factor, image = self._overview
        left, top, right, bottom = (edge * (reduce // factor) for edge in box)
        width, height = min(right, image.width) - left, min(bottom, image.height) - top
        part = image.crop(left, top, width, height)
        if reduce > factor:
            part = part.shrink(reduce // factor, reduce // factor, ceil=True)
        with self._explained():
            pixels = part.numpy()
        # Stored reductions may lack the last row and column, where the sides are odd.
        lacking = box[3] - box[1] - len(pixels), box[2] - box[0] - pixels.shape[1]
        edges = [(0, max(0, lack)) for lack in lacking]
        return np.pad(pixels, (*edges, (0, 0)), "edge") if max(lacking) > 0 else pixels

    @cached_property
    def _overview(self) -> tuple[int, Any]:
        """A reduction that fits into memory, so that coarse levels read the file only once."""
        pixels, factor = math.prod(self.size), 1
        while pixels / factor**2 > _OVERVIEW:
            factor *= 2
        nearest = max(f for f in self._stored if f <= factor)
        image, rest = self._stored[nearest], factor // nearest
        with self._explained():
            small = image.shrink(rest, rest, ceil=True) if rest > 1 else image
            return factor, small.copy_memory()

    def _open(self, **options: int) -> Any:
        image = self._vips.Image.new_from_file(
            self._path, access="random", fail_on="error", **options
        ).autorot()
        if image.format == "uchar" or (image.format == "ushort" and image.bands > 1):
            image = image.colourspace("srgb")  # of 16 bits it takes the high byte
            if image.hasalpha() and image.bands == 4:
                image = image.flatten(background=[255])
            return image.extract_band(0, n=3).cast("uchar")
        image = image.extract_band(0, n=3 if image.bands > 2 else 1)
        low, high = self._span(image)
        if image.format in ("float", "double"):
            image = (image == image).ifthenelse(image, low)  # NaN
        image = ((image - low) * 255 / ((high - low) or 1)).rint().cast("uchar")
        return image if image.bands == 3 else image.bandjoin([image, image])

    def _span(self, image: Any) -> tuple[float, float]:
        """What becomes black and what white; reductions have what the image itself has."""
        if self._range is None and image.format == "ushort":
            self._range = 0.0, 65535.0
        elif self._range is None:
            rows = max(1, _BAND // image.width)
            ends = []
            for top in range(0, image.height, rows):
                values = image.crop(0, top, image.width, min(rows, image.height - top)).numpy()
                finite = values[np.isfinite(values)]
                ends += [float(finite.min()), float(finite.max())] if finite.size else []
            if not ends:
                raise InputError(
                    f"{shown(self._path, 100)} has no finite value, so it shows nothing"
                )
            self._range = value_range(image.format in ("float", "double"), min(ends), max(ends))
        return self._range

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What libvips says of a damaged file, in one line; it may notice at any window."""
        try:
            yield
        except self._vips.Error as error:
            raise InputError(
                f"libvips cannot read {shown(self._path, 100)} as an image: {shown(error, 100)}"
            ) from None

    def _reductions(self) -> dict[int, Any]:
        """Factor -> the image's stored reductions by powers of two."""
        found: dict[int, Any] = {}
        for kind in ("subifd", "page"):
            name = f"n-{kind}s"
            count = self._image.get(name) if self._image.get_typeof(name) else 0
            for number in range(kind == "page", count):
                image = self._open(**{kind: number})
                factor = 2 ** round(math.log2(max(1.0, self._image.width / image.width)))
                expected = [-(-side // factor) for side in (self._image.width, self._image.height)]
                if factor > 1 and abs(np.subtract(expected, (image.width, image.height))).max() < 2:
                    found.setdefault(factor, image)
        return found


def open_image(
    source: str | Path | Image.Image | LargeImage, max_pixels: int | None = None
) -> LargeImage:
    """An image by windows.

    Args:
        source: a file, read through libvips if pyvips is installed and else by Pillow; an image in
            memory; or an image already.
        max_pixels: most pixels of a file that Pillow reads, see `foveate.io.images.load_image`; a
            file that is read by windows may have any number of them.

    Raises:
        InputError: the file is not there, cannot be read, or is too large to be held in memory.
    """
    if isinstance(source, Image.Image):
        return Held(source)
    if not isinstance(source, str | Path):
        return source
    if "\0" in str(source) or not os.path.isfile(source):
        raise InputError(f"there is no image {shown(source, 100)}")
    try:
        return Stored(source)
    except FoveateError as error:
        if isinstance(error, InputError):
            raise
    option = "pip install 'foveate[large]' reads it by windows, and open_image's max_pixels"
    return Held(load_image(source, max_pixels=max_pixels, option=option))


def read_tile(
    image: LargeImage, level: Level, row: int, column: int, smooth: bool = True
) -> np.ndarray:
    """What a tile of a level shows: (height, width, 3) float32 in 0 to 255, without padding.

    Args:
        image: where from.
        level: of the image's pyramid.
        row: of the tile.
        column: of the tile.
        smooth: average over all pixels that an output pixel covers (bilinear with antialiasing);
            else interpolate between the four nearest, as the released code does, which skips most
            of a large image.
    """
    (height, width), side = level.size, level.tile
    rows = (row * side, min((row + 1) * side, height))
    columns = (column * side, min((column + 1) * side, width))
    return (_smooth if smooth else _sampled)(image, level, rows, columns)


def _smooth(image: LargeImage, level: Level, rows: Size, columns: Size) -> np.ndarray:
    step = image.size[0] / level.size[0], image.size[1] / level.size[1]
    reduce = 2 ** max(0, math.floor(math.log2(max(min(step), 1))))
    spans, starts = [], []
    for span, scale, whole in zip((rows, columns), step, image.size, strict=True):
        first, last = (edge * scale / reduce for edge in span)
        start = max(0, math.floor(first) - _MARGIN)
        spans.append((start, min(-(-whole // reduce), math.ceil(last) + _MARGIN)))
        starts.append((first - start, min(last, whole / reduce) - start))
    (top, bottom), (left, right) = spans
    part = Image.fromarray(image.window((left, top, right, bottom), reduce))
    box = (starts[1][0], starts[0][0], starts[1][1], starts[0][1])
    out = (columns[1] - columns[0], rows[1] - rows[0])
    return np.asarray(part.resize(out, Image.Resampling.BILINEAR, box=box), np.float32)


def _sampled(image: LargeImage, level: Level, rows: Size, columns: Size) -> np.ndarray:
    height, width = image.size
    x0, x1, right = _neighbours(columns, width / level.size[1], width)
    left, end = int(x0[0]), int(x1[-1]) + 1
    per_band = max(1, int(_BAND / (end - left) * level.size[0] / height))
    bands = []
    for start in range(*rows, per_band):
        span = (start, min(start + per_band, rows[1]))
        y0, y1, below = _neighbours(span, height / level.size[0], height)
        top = int(y0[0])
        part = image.window((left, top, end, int(y1[-1]) + 1), 1)
        lines = _mix(part[y0 - top], part[y1 - top], below[:, None, None])
        bands.append(_mix(lines[:, x0 - left], lines[:, x1 - left], right[None, :, None]))
    return np.concatenate(bands)


def _neighbours(span: Size, scale: float, whole: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels before and after each output pixel's centre, and the weight of the one after."""
    at = np.maximum((np.arange(*span) + 0.5) * scale - 0.5, 0)
    before = np.minimum(at.astype(np.int64), whole - 1)
    return before, np.minimum(before + 1, whole - 1), (at - before).astype(np.float32)


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + (b.astype(np.float32) - a) * share


def _pyvips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError):
        raise FoveateError(
            "large images are read through pyvips; pip install 'foveate[large]'"
        ) from None
    return pyvips
