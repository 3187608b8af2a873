"""Opening images: whatever a file holds becomes RGB of 8 bits, the same way everywhere.

- 16-bit grey: the whole range counts, 0 to 65535 becomes 0 to 255 (value / 257, rounded). A TIFF
  that declares 12 bits ends at 4095. Contrast is never stretched.
- 32-bit integers: taken as 8 bits where all values lie in 0 to 255, as 16 bits where they lie in 0
  to 65535, else stretched from the least value to the greatest.
- Floats: 0 to 1 becomes 0 to 255 where all values lie in [0, 1], else stretched from the least to
  the greatest. What is not finite does not count: NaN is black, infinities are the ends.
- 16-bit colour: the high byte of each value.
- Transparent pixels: the image is laid on white.
- Palette, one bit, CMYK, YCbCr, HSV: as Pillow converts them, without colour profiles.
- The orientation that a camera noted is applied. Of an animation or of several pages the first is
  taken, with a warning.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from foveate.errors import InputError
from foveate.io.quoting import quoted, shown

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by what EXIF calls the orientation
_LIMIT = threading.Lock()


def load_image(
    source: str | Path | BinaryIO,
    *,
    max_pixels: int | None = None,
    option: str = "max_pixels",
    name: str | None = None,
) -> Image.Image:
    """Open an image, upright and in RGB; the head of the module says what becomes of other kinds.

    Args:
        source: a file, or an open one.
        max_pixels: most pixels that are read; `None` for Pillow's limit against decompression
            bombs, 2 * `PIL.Image.MAX_IMAGE_PIXELS`. Pillow's limit is one of the process, so a
            number here lifts it there while the file is opened.
        option: what lifts the limit where the caller was called; the message names it.
        name: what to call the source in messages; a file's path by default.

    Raises:
        InputError: there is no such file, it is no image, it is damaged, or it has too many pixels.
    """
    called = shown(str(source if name is None else name), 100)
    if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
        raise InputError(f"{option} must be a positive whole number, got {quoted(max_pixels)}")
    if isinstance(source, str | Path):
        _check_file(source, called)
    with _explained(called, option), _opened(source, max_pixels) as image:
        _check_size(image, called, max_pixels, option)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a preview
            warnings.warn(
                f"{called} holds several images (an animation, or pages); only the first is used",
                stacklevel=2,
            )
        return _upright(image, called)


def as_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """An image in memory, upright and in RGB, as `load_image` makes it of a file.

    Raises:
        InputError: it has no pixels, or none that are finite, or its file is damaged.
    """
    with _explained(name, "max_pixels"):
        return _upright(image, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """The colours of an image as RGB of 8 bits, as it lies: its orientation is not applied.

    Raises:
        InputError: it has no pixels, or none that are finite.
    """
    image.load()
    if not (image.width and image.height):
        raise InputError(f"an image of {image.width}x{image.height} has no pixels")
    if image.mode in (*_DEEP, "I", "F"):
        return _scaled(image).convert("RGB")
    if image.mode == "La":  # premultiplied; it can only become LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")


def value_range(floats: bool, low: float, high: float) -> tuple[float, float]:
    """What becomes black and what white, of values whose depth the file does not tell.

    Args:
        floats: whether values are floats; else whole numbers.
        low: the least of them.
        high: the greatest.
    """
    known = ((0, 1),) if floats else ((0, 255), (0, 65535))
    return next(((a, b) for a, b in known if a <= low and high <= b), (low, high))


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits as one of 8."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    if image.mode in _DEEP:
        low, high = 0.0, float(2 ** tags.get(_BITS, (16,))[0] - 1)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # older Pillow: 16 bits
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise InputError("an image without a finite value cannot be shown")
        low, high = value_range(image.mode == "F", float(finite.min()), float(finite.max()))
    scaled = _to_bytes(values, low, high)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits only
        scaled = 255 - scaled
    if (clear := image.info.get("transparency")) is not None:
        scaled = np.where(values == clear, 255, scaled)
    return Image.fromarray(scaled.astype(np.uint8))


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as 0 to 255, rounded; what lies outside becomes the nearer."""
    if (
        values.dtype.kind == "u" and values.dtype.itemsize == 2
    ):  # one division for each value that there can be
        return _to_bytes(np.arange(65536.0), low, high)[values]
    steps = (values.astype(np.float64) - low) * 255 / ((high - low) or 1)
    return np.nan_to_num(steps, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def _upright(image: Image.Image, name: str) -> Image.Image:
    """In RGB and turned as the camera noted; nothing is left to turn it once more."""
    upright, turn = to_rgb(image), None
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # a note about the image must not keep it from being read
        warnings.warn(
            f"the EXIF data of {name} is damaged ({shown(error, 100)}); taken as it is stored",
            stacklevel=3,
        )
    upright.info.clear()
    return upright if turn is None else upright.transpose(turn)


@contextmanager
def _opened(source: str | Path | BinaryIO, max_pixels: int | None) -> Iterator[Any]:
    """The image of a file, not yet decoded; without Pillow's limit where another is given."""
    if max_pixels is None:
        with Image.open(source) as image:
            yield image
        return
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            opened = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with opened as image:
        yield image


def _check_file(path: str | Path, name: str) -> None:
    try:
        found = Path(path)
        if found.is_dir():
            raise InputError(f"{name} is a folder, not an image file")
        if not found.exists():
            raise InputError(f"no such image file: {name}")
        if found.is_file() and not found.stat().st_size:
            raise InputError(f"{name} is empty, not an image file")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise InputError(f"no such image file: {name} ({shown(error, 100)})") from None


def _check_size(image: Image.Image, name: str, max_pixels: int | None, option: str) -> None:
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        raise InputError(
            f"{name} has too many pixels ({pixels}, the limit is {max_pixels}); {option} sets "
            "another limit"
        )


@contextmanager
def _explained(name: str, option: str) -> Iterator[None]:
    """Whatever a damaged file makes Pillow raise, as one line that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if name in str(error) else f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        pixels, limit, *_ = [*re.findall(r"\d+", str(error)), "unknown", "unknown"]
        raise InputError(
            f"{name} has too many pixels ({pixels}, the limit is {limit}); {option} sets another "
            "limit"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"cannot read {name} as an image: it is damaged, or its format is unknown"
        ) from None
    except Exception as error:  # damaged files raise all kinds, SyntaxError and KeyError among them
        reason = shown(error, 100) or type(error).__name__
        raise InputError(f"cannot read {name} as an image: {reason}") from None
