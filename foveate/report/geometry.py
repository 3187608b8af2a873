"""How a processor maps an image onto the token grid, and how to find that out.

It does so in one of three ways (`Geometry`): `resize` stretches the whole image, `crop` cuts the
centre out, `pad` fills the image up to a square first.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.io.images import to_rgb

Geometry = Literal["resize", "crop", "pad"]
Box = tuple[float, float, float, float]

FILL = (123, 117, 104)  # what `pad` pads with: the mean colour of CLIP's training images
PROBE = 24  # edge in pixels at which geometries are compared


def place_grid(image: Image.Image, geometry: str, aspect: float = 1.0) -> tuple[Image.Image, Box]:
    """The canvas that a geometry makes of an image, and the box on it that the grid covers.

    Args:
        image: the image.
        geometry: how the processor maps it.
        aspect: width of the grid over its height.

    Raises:
        InputError: the geometry is none of the three.
    """
    image = to_rgb(image)
    width, height = image.size
    if geometry == "resize":
        return image, (0, 0, width, height)
    if geometry == "crop":
        seen_width, seen_height = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - seen_width) / 2, (height - seen_height) / 2
        return image, (left, top, left + seen_width, top + seen_height)
    if geometry == "pad":
        size = (max(width, round(height * aspect)), max(height, round(width / aspect)))
        canvas = Image.new("RGB", size, FILL)
        canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
        return canvas, (0, 0, *size)
    raise InputError(
        f"geometry must be 'auto' or one of {', '.join(get_args(Geometry))}, got {geometry!r}"
    )


def match_geometry(image: Image.Image, pixels: Tensor) -> Geometry:
    """Find out how the processor mapped an image.

    Each geometry is rendered small and grey, and the one that correlates best with what the encoder
    saw is taken. Of a square image all three are the same: `resize`.

    Args:
        image: the image as the user has it.
        pixels: (C, H, W) what the vision encoder was fed, normalised in any way.
    """
    if image.width == image.height:
        return "resize"
    seen = pixels.detach().float().cpu().mean(0)
    aspect = seen.shape[1] / seen.shape[0]
    seen = torch.nn.functional.adaptive_avg_pool2d(seen[None], PROBE)[0]
    scores: dict[Geometry, float] = {}
    for geometry in get_args(Geometry):
        canvas, box = place_grid(image, geometry, aspect)
        small = canvas.resize((PROBE, PROBE), Image.Resampling.BOX, box=box)
        grey = torch.tensor(list(small.tobytes())).view(PROBE, PROBE, 3).float().mean(-1)
        across = min(math.ceil(PROBE * (1 - image.width / canvas.width) / 2), PROBE // 2 - 1)
        down = min(math.ceil(PROBE * (1 - image.height / canvas.height) / 2), PROBE // 2 - 1)
        # Processors pad with different colours, so the padding itself is not compared.
        inside = (slice(down, PROBE - down), slice(across, PROBE - across))
        scores[geometry] = _correlation(grey[inside], seen[inside])
    return max(scores, key=lambda name: scores[name])


def choose_geometry(
    pixels: Tensor | None,
    image: Image.Image,
    number: int,
    count: int,
    grid: tuple[int, int],
) -> Geometry:
    """The geometry of one of `count` images, given what the encoder saw of all, and the grid."""
    if pixels is not None and len(pixels) == count:
        seen = pixels[number]
        return match_geometry(image, seen if seen.dim() == 3 else seen[0])  # the thumbnail
    height, width = grid
    if image.width == image.height or (
        # A grid of the image's own shape, but for the rounding to whole cells.
        height != width and abs(image.width / image.height * height - width) <= 1
    ):
        return "resize"
    raise InputError(
        "cannot tell how the processor mapped the image, because it is not known what the vision "
        "encoder saw of it; pass geometry='resize', 'crop' or 'pad'"
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    """Normalised correlation of two maps, in [-1, 1]."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))
