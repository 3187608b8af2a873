"""Downsample: the baseline that shows the model a smaller image.

The fair rival of every pruning method is the same image at a lower resolution. A tower with a
fixed grid cannot be given a smaller image, so the grid of its features is average-pooled instead,
which is what is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
from foveate.errors import InputError
from foveate.ops.pooling import is_whole, pooled_axis


@register("downsample", stage="pre_llm", does="pools to a lower resolution", paper="baseline")
@dataclass(frozen=True)
class Downsample(Method):
    """Average-pool the token grid to at most the wanted number of tokens.

    The pooled grid is the largest whose aspect ratio is that of the image to within one cell, so
    it may hold somewhat fewer tokens than wanted (56 = 7 x 8 where 58 of 24 x 24 are wanted).
    Frames of a video share the tokens equally; where each has less than one, neighbouring frames
    are averaged. A newline token after the frames stays while there is room.

    Args:
        keep: an upper bound of what survives, as a share (rounded down) or a count.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` gives each that of the token at the centre of its cell.

    Cost: a (K, V) matrix times the features.
    """

    keep: Keep = 0.25
    positions: Positions | None = None
    note = "the grid of features was average-pooled, since the tower's own grid is fixed"

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing."""
        return (Step("pre_llm", whole=True, merges=True),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Pool every image's grid to at most `count` cells.

        Raises:
            InputError: tokens are missing from the grid, so that it cannot be pooled.
        """
        (height, width), device, images = tokens.grid, tokens.index.device, len(tokens.index)
        if not is_whole(tokens):
            raise InputError(
                f"downsample pools the whole {height} x {width} token grid of an image, but "
                f"{tokens.count} tokens are left of its {tokens.frames * height * width}; put it "
                "before methods that remove tokens, or use 'uniform'"
            )
        if count == tokens.count:
            return Reduction(torch.arange(count, device=device).expand(images, -1))
        extra = tokens.count - tokens.frames * height * width
        room = min(extra, count - 1)
        frames = min(tokens.frames, count - room)
        rows, columns = pooled_grid(height, width, (count - room) // frames)
        index, weights = pooled_axis(tokens.frames, frames, device)
        for size, cells in ((height, rows), (width, columns)):
            centres, shares = pooled_axis(size, cells, device)
            index = (index[:, None] * size + centres).flatten()
            weights = torch.kron(weights, shares)
        rest = torch.arange(tokens.count - extra, tokens.count - extra + room, device=device)
        index = torch.cat((index, rest))
        weights = torch.block_diag(weights, torch.eye(room, extra, device=device))
        return Reduction(index.expand(images, -1), weights.expand(images, -1, -1))


def pooled_grid(height: int, width: int, count: int) -> tuple[int, int]:
    """The largest (rows, columns) of at most `count` cells, true to the aspect ratio by a cell.

    Among grids of equal size the one nearest to the aspect ratio wins, then the wider one.
    """

    def error(rows: int, columns: int) -> float:
        return min(abs(columns - rows * width / height), abs(rows - columns * height / width))

    grids = [
        (rows, columns)
        for rows in range(1, min(height, count) + 1)
        for columns in range(1, min(width, count // rows) + 1)
        if error(rows, columns) <= 1
    ]
    return max(grids, key=lambda grid: (grid[0] * grid[1], -error(*grid), grid[1]))
