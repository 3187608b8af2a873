"""Pooling: averages over the cells of a grid of tokens.

Shapes: `G` images, `V` tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core import Reduction, VisualTokens
from foveate.errors import InputError


def is_whole(tokens: VisualTokens) -> bool:
    """Whether nothing was removed of the grid, nor of what is after it."""
    cells = tokens.frames * tokens.grid[0] * tokens.grid[1]
    return tokens.count >= cells and bool((tokens.index[:, -1] == tokens.count - 1).all())


def check_grid(tokens: VisualTokens, slug: str) -> None:
    """Refuse tokens that are not whole grids and nothing else.

    Raises:
        InputError: tokens are missing, or others follow the grid, such as newlines.
    """
    height, width = tokens.grid
    if not is_whole(tokens) or tokens.count != tokens.frames * height * width:
        raise InputError(
            f"{slug} pools the whole {height} x {width} token grid of an image, but {tokens.count} "
            f"tokens are there instead of {tokens.frames * height * width}; it takes images of one "
            "grid without newlines, and comes before methods that remove tokens"
        )


def pooled_axis(size: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Adaptive average pooling of one axis: (cells,) centres and (cells, size) weights."""
    cell = torch.arange(cells, device=device)
    start = cell * size // cells
    end = ((cell + 1) * size + cells - 1) // cells
    at = torch.arange(size, device=device)
    inside = (at >= start[:, None]) & (at < end[:, None])
    return (start + end - 1) // 2, inside / (end - start)[:, None]


def pool_cells(tokens: VisualTokens, rows: int, columns: int) -> Reduction:
    """Adaptive average pooling of each frame's grid.

    Args:
        tokens: G images of whole grids.
        rows: cells of a column, at most the grid's height.
        columns: cells of a row.

    Returns:
        One survivor for each cell, at its centre; cells overlap where they do not divide the grid.
    """
    device, images = tokens.index.device, len(tokens.index)
    index, weights = torch.arange(tokens.frames, device=device), torch.eye(tokens.frames).to(device)
    for size, cells in zip(tokens.grid, (rows, columns), strict=True):
        centres, shares = pooled_axis(size, cells, device)
        index = (index[:, None] * size + centres).flatten()
        weights = torch.kron(weights, shares)
    return Reduction(index.expand(images, -1), weights.expand(images, -1, -1))
