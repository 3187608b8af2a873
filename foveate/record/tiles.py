"""Tiles: images that a processor cuts up, where each tile is encoded as an image.

Processors of these families scale an image to a grid of tiles, cut it, and put a thumbnail of the
whole before or after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PROBE = 48  # edge in pixels at which arrangements are compared


class Tiling(NamedTuple):
    """An image of a prompt, as the user passed it.

    Args:
        tiles: tiles that it was cut into, its thumbnail included; 1 if it was not cut.
        grid: (rows, columns) of its tiles without the thumbnail; `None` if the prompt does not say.
        thumbnail: whether one of the tiles is the thumbnail.
    """

    tiles: int
    grid: tuple[int, int] | None = None
    thumbnail: bool = True


class TokenBoxes(NamedTuple):
    """Where the tokens of an image or a tile lie.

    Args:
        boxes: (V, 4) left, top, right and bottom edge of its tokens, in [0, 1].
        tile: which of how many tiles of its image it is; (0, 1) where images are not cut.
        whole: whether the boxes are shares of the whole image, not of the tile.
    """

    boxes: Tensor
    tile: tuple[int, int] = (0, 1)
    whole: bool = True


def join(
    spans: Sequence[tuple[int, int]], together: Callable[[int, int], bool]
) -> list[list[tuple[int, int]]]:
    """Group the tiles of a row into images.

    Args:
        spans: first column of each tile, and the first after it.
        together: whether a tile that ends before one column, and the next, which begins at another,
            are of one image.
    """
    images: list[list[tuple[int, int]]] = []
    for number, span in enumerate(spans):
        if number and together(spans[number - 1][1], span[0]):
            images[-1].append(span)
        else:
            images.append([span])
    return images


def match_grid(tiles: Tensor, thumbnail: Tensor) -> tuple[int, int] | None:
    """(rows, columns) in which tiles look like the thumbnail, or `None` if that is not clear.

    Args:
        tiles: (N, C, H, W) in raster order.
        thumbnail: (C, H, W) the same image, small.
    """
    tiles, thumbnail = tiles.float(), thumbnail.float()
    count, _, height, width = tiles.shape
    seen = F.adaptive_avg_pool2d(thumbnail, PROBE)
    errors: dict[tuple[int, int], float] = {}
    for rows in (n for n in range(1, count + 1) if count % n == 0):
        columns = count // rows
        image = tiles.view(rows, columns, -1, height, width).permute(2, 0, 3, 1, 4)
        small = F.adaptive_avg_pool2d(image.reshape(-1, rows * height, columns * width), PROBE)
        errors[rows, columns] = float((small - seen).square().mean())
    best, *others = sorted(errors, key=lambda grid: errors[grid])
    clear = not others or errors[best] < 0.5 * errors[others[0]]
    return best if clear else None


def in_image(boxes: Tensor, tile: int, grid: tuple[int, int]) -> Tensor:
    """Boxes of a tile as shares of its image.

    Args:
        boxes: (V, 4) shares of the tile.
        tile: its raster number.
        grid: (rows, columns) of the image's tiles.
    """
    rows, columns = grid
    row, column = divmod(tile, columns)
    corner = torch.tensor([column, row, column, row])
    return (boxes + corner) / torch.tensor([columns, rows, columns, rows])
