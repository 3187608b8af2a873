"""Pooling: averages over the cells of a grid of tokens.

Shapes: `G` images, `V` tokens of each.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.core import Reduction, VisualTokens
from foveate.errors import InputError


def is_whole(tokens: VisualTokens) -> bool:
    """Whether nothing was removed of the grid, nor of what is after it."""
    cells = tokens.frames * tokens.grid[0] * tokens.grid[1]
    if tokens.count < cells or tokens.count == tokens.total:
        return tokens.count >= cells
    return bool((tokens.index[:, -1] == tokens.count - 1).all())


def cells_of(tokens: VisualTokens, slug: str) -> int:
    """Tokens of the grids of all frames; others may follow them, such as a newline.

    Raises:
        InputError: some are missing.
    """
    height, width = tokens.grid
    cells = tokens.frames * height * width
    if not is_whole(tokens):
        raise InputError(
            f"{slug} pools the whole {height} x {width} token grid of an image, but {tokens.count} "
            f"tokens are left of {cells}; put it before methods that remove tokens"
        )
    return cells


def with_rest(reduction: Reduction, tokens: VisualTokens, cells: int) -> Reduction:
    """A reduction of the cells of grids, after which all that follows them stays.

    Args:
        reduction: of the first `cells` tokens.
        tokens: all of them.
        cells: tokens of the grids.
    """
    if not (extra := tokens.count - cells):
        return reduction
    kept, images = reduction.kept, len(reduction.index)
    rest = torch.arange(extra, device=reduction.index.device)
    made = replace(reduction, index=torch.cat((reduction.index, _each(cells + rest, images)), 1))
    if reduction.weights is not None:
        eye = torch.eye(extra, device=rest.device)
        weights = torch.stack([torch.block_diag(each, eye) for each in reduction.weights])
        made = replace(made, weights=weights)
    if reduction.slot is not None and reduction.share is not None:
        slot = torch.cat((reduction.slot, _each(kept + rest, images)), 1)
        share = torch.cat((reduction.share, reduction.share.new_ones(images, extra)), 1)
        made = replace(made, slot=slot, share=share)
    if reduction.values is not None:
        made = replace(made, values=torch.cat((reduction.values, tokens.x[:, cells:]), 1))
    return made


def _each(row: Tensor, images: int) -> Tensor:
    return row.expand(images, -1)


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
    index, weights = (
        torch.arange(tokens.frames, device=device),
        torch.eye(tokens.frames, device=device),
    )
    for size, cells in zip(tokens.grid, (rows, columns), strict=True):
        centres, shares = pooled_axis(size, cells, device)
        index = (index[:, None] * size + centres).flatten()
        weights = torch.kron(weights, shares)
    return Reduction(index.expand(images, -1), weights.expand(images, -1, -1))
