"""The Dynamic Image Pyramid: an image at increasing resolution, cut into square tiles.

Nothing here touches pixels; a level only says how large the image is there and where its tiles
and their tokens lie. Shapes: `N` tokens of a level, `K` of them chosen, `D` hidden, `S` tokens
along the side of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """One resolution of an image. The image lies top left on a canvas of whole tiles.

    Args:
        size: (height, width) of the image at this level, in pixels.
        tile: side of a tile in pixels.
    """

    size: Size
    tile: int

    @property
    def blocks(self) -> Size:
        """Rows and columns of tiles."""
        height, width = self.size
        return -(-height // self.tile), -(-width // self.tile)

    def tiles(self) -> Tensor:
        """(rows x columns, 2) row and column of every tile, in raster order."""
        rows, columns = self.blocks
        return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))

    def cells(self, side: int) -> Size:
        """Rows and columns of tokens that show some of the image, `side` tokens along a tile."""
        height, width = self.size
        return -(-height * side // self.tile), -(-width * side // self.tile)


def levels(
    size: Size, tile: int, shortest: int | None = None, measured: Literal["long", "short"] = "long"
) -> list[Level]:
    """The levels of an image, coarse to fine: the thumbnail, which is one tile, then level 1 to P.

    Resolution doubles from level to level up to that of the image; level 1 is the one at which
    the measured side has `shortest` pixels. Every level is enlarged until it fills its tiles along
    one side.

    Args:
        size: (height, width) of the image in pixels.
        tile: side of a tile in pixels.
        shortest: pixels of the measured side at level 1; three tiles when left out.
        measured: the side that `shortest` speaks of: the longer, as the released code has it, or
            the shorter, as the paper has it.

    Returns:
        One level alone where the image fits into a tile, since nothing is finer there.

    Raises:
        InputError: a side is not positive.
    """
    height, width = size
    if min(height, width, tile) < 1:
        raise InputError(f"a pyramid needs an image and tiles of at least 1 pixel, got {size}")
    thumbnail = min(tile / height, tile / width)
    side = max(size) if measured == "long" else min(size)
    least = min(1.0, (3 * tile if shortest is None else shortest) / side)
    scales, scale = [], 1.0
    while scale >= least:
        scales.append(scale)
        scale /= 2
    finer = {s for s in (*scales, least) if s > thumbnail}
    return [_level(size, tile, s) for s in (thumbnail, *sorted(finer))]


def _level(size: Size, tile: int, scale: float) -> Level:
    height, width = (max(1, round(edge * scale)) for edge in size)
    rows, columns = -(-height // tile), -(-width // tile)
    enlarge = min(rows * tile / height, columns * tile / width)
    return Level((max(1, round(height * enlarge)), max(1, round(width * enlarge))), tile)


def pool(tokens: Tensor) -> Tensor:
    """Halve the token grid of tiles: (N, S, S, D) -> (N, ceil(S / 2), ceil(S / 2), D), bilinear."""
    half = math.ceil(tokens.shape[1] / 2)
    planes = F.interpolate(tokens.movedim(-1, 1), (half, half), mode="bilinear")
    return planes.movedim(1, -1)


def unpadded_as_released(original: Size, cells: Size) -> Size:
    """Rows and columns of a token grid that the released code leaves after unpadding.

    It compares the image's aspect ratio with that of the grid and cuts down to whole tokens in
    floating point, so that it can lose a token that is fully covered (53.99 of 54 become 53).

    Args:
        original: (height, width) of the image.
        cells: rows and columns of tokens of the whole canvas.
    """
    (height, width), (rows, columns) = original, cells
    if width / height > columns / rows:
        return int(height * (columns / width)), columns
    return rows, int(width * (rows / height))


@dataclass(frozen=True, eq=False)
class Local:
    """Tokens of a level's tiles, in raster order; a row may end in a newline token.

    Args:
        level: where they are.
        cell: (N, 2) row and column of each token in the level's grid of tokens.
        values: (N, D) features.
        grid: rows and columns of the level's grid, without newlines; a newline stands in column
            `grid[1]`.
        side: tokens along a tile.
    """

    level: Level
    cell: Tensor
    values: Tensor
    grid: Size
    side: int

    @property
    def newline(self) -> Tensor:
        """(N,) which tokens are newlines."""
        return self.cell[:, 1] == self.grid[1]

    @property
    def wide(self) -> Size:
        """Rows and columns of the whole grid, newlines counted as a column if there are some."""
        return self.grid[0], self.grid[1] + int(self.newline.any())

    @property
    def order(self) -> Tensor:
        """(N,) position of each token on the whole grid, row by row."""
        return self.cell[:, 0] * self.wide[1] + self.cell[:, 1]

    def boxes(self) -> Tensor:
        """(N, 4) left, top, right and bottom edge as shares of the image; NaN for newlines."""
        scale = self.level.tile / self.side
        row, column = self.cell.unbind(1)
        height, width = self.level.size
        edges = torch.stack(
            (column / width, row / height, (column + 1) / width, (row + 1) / height), 1
        )
        return (edges * scale).clamp(max=1).masked_fill(self.newline[:, None], torch.nan)

    def take(self, index: Tensor) -> Local:
        """The tokens at ascending `index` alone."""
        return Local(self.level, self.cell[index], self.values[index], self.grid, self.side)


def lay_out(
    level: Level,
    tiles: Tensor,
    values: Tensor,
    newline: Tensor | None = None,
    grid: Size | None = None,
    every_row: bool = False,
) -> Local:
    """Put tokens of tiles into raster order, without those that only show padding.

    Args:
        level: where the tiles are.
        tiles: (n, 2) row and column of each tile.
        values: (n, S, S, D) their tokens.
        newline: (D,) what ends a row of tokens; `None` for models without such.
        grid: rows and columns that show the image; `Level.cells` when left out.
        every_row: end rows of which no tile is there with a newline too.
    """
    side = values.shape[1]
    rows, columns = level.cells(side) if grid is None else grid
    inside = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    cell = (tiles.cpu()[:, None] * side + inside).flatten(0, 1)
    shown = (cell[:, 0] < rows) & (cell[:, 1] < columns)
    cell, flat = cell[shown], values.flatten(0, 2)[shown.to(values.device)]
    if newline is not None:
        ended = torch.arange(rows) if every_row else cell[:, 0].unique()
        ends = torch.stack((ended, torch.full_like(ended, columns)), 1)
        cell = torch.cat((cell, ends))
        flat = torch.cat((flat, newline.to(flat).expand(len(ends), -1)))
    order = (cell[:, 0] * (columns + 1) + cell[:, 1]).argsort()
    return Local(level, cell[order], flat[order.to(flat.device)], (rows, columns), side)


def tiles_below(tokens: Local, finer: Level) -> Tensor:
    """(n, 2) tiles of a finer level that the centres of tokens lie in, distinct, in raster order.

    Newlines stand for no position and call for no tile.
    """
    cell = tokens.cell[~tokens.newline]
    share = (cell + 0.5) * (tokens.level.tile / tokens.side) / torch.tensor(tokens.level.size)
    pixel = share.clamp(max=1) * torch.tensor(finer.size)
    last = torch.tensor(finer.blocks) - 1
    return torch.minimum((pixel / finer.tile).long(), last).unique(dim=0)


def tiles_below_as_released(cell: Tensor, grid: Size, blocks: Size) -> Tensor:
    """The same by the released rule: equal shares of the grid for every tile, newlines included.

    Newlines are taken for a last column, so that every row that ends in one calls for the last
    tile of its row.

    Args:
        cell: (K, 2) row and column of tokens.
        grid: rows and columns of tokens, newlines counted as a column.
        blocks: rows and columns of tiles of the finer level.
    """
    return (cell * torch.tensor(blocks) // torch.tensor(grid)).unique(dim=0)
