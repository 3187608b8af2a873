"""PixelPrune: before the encoder runs, drop cells whose pixels their neighbours predict.

Paper: Wang et al., "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding",
arXiv:2604.00886. Reference code: OPPO-Mente-Lab/PixelPrune @ 0bf89f3, its default selector; nothing
of it is copied.
Differs from the reference: pixels are compared as the encoder receives them, normalised and in its
dtype; the reference first maps the pixels of Qwen3-VL back to a scale from 0 to 1. Its threshold t
is therefore 2 t here, as that model's processor divides by a standard deviation of 0.5, and t / std
on other models. Where channels have different std, no single threshold here is the same. With 0
there is no difference. Any batch works. With a threshold above 0, the cells of a diagonal are
compared together; the reference compares them one by one, with the same result. Each frame of a
video is treated as an image; the reference prunes only images. Its other distances and selectors
are not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core import (
    Method,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Range


@register(
    "pixelprune",
    stage="vision",
    does="drops cells of repeated pixels",
    needs=("pixels",),
    paper="Wang et al. 2026, arXiv:2604.00886",
)
@dataclass(frozen=True)
class PixelPrune(Method):
    """Keep the tokens whose pixels differ from those that their neighbours predict.

    Each token is predicted from its left neighbour. The prediction comes from the upper neighbour
    instead if the token diagonally above left equals the left neighbour but not the upper one. The
    first row is predicted from the left, the first column from above, and the first token always
    survives. The number of survivors follows from the pixels: an image without repetition keeps all
    tokens.

    Args:
        threshold: two cells count as equal if no pixel value differs by more than this, in
            normalised values, as the encoder receives them (not 0 to 255, and not 0 to 1). 0 means
            bit-equal. Above 0, a dropped token counts as the survivor that predicts it, so that
            differences do not accumulate.
        keep: must be `None`; there is no budget.
        positions: of the survivors in a language model; `None` keeps the original ones
            (`original`), as the reference does; `renumbered` makes them consecutive where positions
            are single numbers.

    Cost: three comparisons of each token's pixels, before the encoder; no matrix product.
    """

    threshold: Annotated[float, Range(0)] = 0.0
    keep: None = None
    positions: Positions | None = None
    adaptive = True
    published_positions = "original"

    def check_budget(self, steps: int | None) -> None:
        """There is none."""

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction before the first encoder layer."""
        return (Step("vision", 0, (Need("pixels"),), effects=("ragged",)),)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """The least that can survive: the first token."""
        return min(1, remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the tokens that are predicted wrongly; each image keeps its own number."""
        cells = tokens.signal("pixels").flatten(2)
        grid = cells.unflatten(1, (tokens.frames, *tokens.grid)).flatten(0, 1)
        keep = anchored(grid, self.threshold) if self.threshold else unlike_predicted(grid)
        keep = keep.view(len(cells), -1)
        counts = keep.sum(1)
        most = int(counts.max())
        first = (~keep).to(torch.uint8).argsort(dim=1, stable=True)  # survivors, then the others
        index, order = first[:, :most].sort(dim=-1)
        return Reduction(index, valid=order < counts[:, None])


def unlike_predicted(grid: Tensor) -> Tensor:
    """Return (N, H, W): which cells of (N, H, W, P) differ from the cell that predicts them."""
    across = (grid[:, :, 1:] == grid[:, :, :-1]).all(-1)  # (N, H, W - 1) equals its left neighbour
    down = (grid[:, 1:] == grid[:, :-1]).all(-1)  # (N, H - 1, W) equals its upper neighbour
    keep = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
    keep[:, 0, 1:] = ~across[:, 0]
    keep[:, 1:, 0] = ~down[:, :, 0]
    from_above = down[:, :, :-1] & ~across[:, :-1]
    keep[:, 1:, 1:] = ~torch.where(from_above, down[:, :, 1:], across[:, 1:])
    return keep


def anchored(grid: Tensor, threshold: float) -> Tensor:
    """Return the same if cells are equal whose pixels differ by at most a threshold.

    A dropped cell counts as the survivor that it was predicted from.
    """
    height, width = grid.shape[1:3]
    keep = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
    taken = grid.clone()  # what each cell counts as

    def alike(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(-1) <= threshold

    for diagonal in range(1, height + width - 1):  # its cells depend only on earlier diagonals
        first, last = max(0, diagonal - width + 1), min(diagonal + 1, height)
        row = torch.arange(first, last, device=grid.device)
        column = diagonal - row
        before_row, before_column = (row - 1).clamp(min=0), (column - 1).clamp(min=0)
        left, upper = taken[:, row, before_column], taken[:, before_row, column]
        corner = taken[:, before_row, before_column]
        from_above = alike(corner, left) & ~alike(corner, upper)
        from_above = (from_above | (column == 0)) & (row > 0)
        predicted, own = torch.where(from_above[..., None], upper, left), grid[:, row, column]
        same = alike(own, predicted)
        keep[:, row, column] = ~same
        taken[:, row, column] = torch.where(same[..., None], predicted, own)
    return keep
