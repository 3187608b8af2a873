"""Uniform: the baseline that keeps tokens spread evenly over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)


@register("uniform", stage="pre_llm", does="keeps a regular grid", paper="baseline")
@dataclass(frozen=True)
class Uniform(Method):
    """Keep tokens on a regular grid, whatever the image shows.

    Args:
        keep: what survives, as a share (rounded down) or a count.
        positions: `None` gives survivors consecutive positions (`renumbered`),
            where positions are single numbers; `original` leaves them where they were.

    Rows of a video are those of its frames, one below the other. Where tokens are missing from the
    grid already, survivors are spread evenly in raster order.
    Cost: K index computations.
    """

    keep: Keep = 0.25
    positions: Positions | None = None

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing."""
        return (Step("pre_llm"),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` evenly spread tokens of each image."""
        height, width = tokens.grid
        device = tokens.index.device
        if count <= tokens.frames * height * width <= tokens.count:
            index = spread_grid(tokens.frames * height, width, count, device)
        else:
            index = spread_grid(1, tokens.count, count, device)
        return Reduction(index.expand(len(tokens.index), -1))


def spread_grid(height: int, width: int, count: int, device: torch.device | None = None) -> Tensor:
    """Exactly `count` cells spread over a grid.

    Rows are chosen so that gaps are about equal both ways, and the cells of every chosen row
    are spread over its width; rows differ by at most one cell.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        count: cells to choose, K, from 1 to height * width.
        device: where the result lives.

    Returns:
        (K,) raster positions, ascending.
    """
    fewest, most = math.ceil(count / width), min(height, count)
    rows = min(max(round(math.sqrt(count * height / width)), fewest), most)
    cell = torch.arange(count, device=device)
    row = cell * rows // count
    first = (row * count + rows - 1) // rows
    cells = ((row + 1) * count + rows - 1) // rows - first
    column = (2 * (cell - first) + 1) * width // (2 * cells)
    return (2 * row + 1) * height // (2 * rows) * width + column
