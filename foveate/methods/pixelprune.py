"""PixelPrune: before the encoder runs, drop the cells of pixels that their neighbours tell.

Paper: Wang et al., "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding",
arXiv:2604.00886. Reference code: OPPO-Mente-Lab/PixelPrune @ 0bf89f3, its default selector; nothing
of it is copied.
Differs from the reference: pixels are compared as the encoder is handed them, in its dtype, so that
a threshold is one of normalised pixels (there: on a scale from 0 to 1); any batch works, and cells
of a diagonal are looked at together (there: one by one, where the threshold is not 0); frames of a
video are images of their own (there: images alone). The release's other distances and selectors are
not here.
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

    A token is predicted to be like the one on its left; like the one above it where the one above
    and on the left is like the left and unlike the upper. Tokens of the first row are predicted
    from the left, those of the first column from above; the first token stays. The pixels decide
    how many tokens survive: an image without repetitions keeps all of them.

    Args:
        threshold: how far two cells may be apart that are alike: the largest difference of their
            pixels, as the encoder is handed them. With 0 they are the same, bit for bit. Above 0, a
            token that is dropped counts as the survivor that predicts it, so that differences do
            not add up.
        positions: of the survivors in a language model; `None` leaves them where they were
            (`original`), as the reference does; `renumbered` makes them consecutive where positions
            are single numbers.

    Cost: three comparisons of each token's pixels, before the encoder; no product of matrices.
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
        """What survives at least: the first token."""
        return min(1, remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep what the neighbours do not tell, as many of each image as that may be."""
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
    """(N, H, W) which cells of (N, H, W, P) are not the same as the cell that predicts them."""
    across = (grid[:, :, 1:] == grid[:, :, :-1]).all(-1)  # (N, H, W - 1) as on its left
    down = (grid[:, 1:] == grid[:, :-1]).all(-1)  # (N, H - 1, W) as above it
    keep = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
    keep[:, 0, 1:] = ~across[:, 0]
    keep[:, 1:, 0] = ~down[:, :, 0]
    from_above = down[:, :, :-1] & ~across[:, :-1]
    keep[:, 1:, 1:] = ~torch.where(from_above, down[:, :, 1:], across[:, 1:])
    return keep


def anchored(grid: Tensor, threshold: float) -> Tensor:
    """The same where cells are alike whose pixels differ by no more than a threshold.

    A cell that is dropped counts as the survivor that it was predicted from.
    """
    height, width = grid.shape[1:3]
    keep = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
    taken = grid.clone()  # what each cell counts as

    def alike(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(-1) <= threshold

    for diagonal in range(1, height + width - 1):  # whose cells need only those before it
        row = torch.arange(max(0, diagonal - width + 1), min(diagonal + 1, height))
        column = diagonal - row
        before_row, before_column = (row - 1).clamp(min=0), (column - 1).clamp(min=0)
        left, upper = taken[:, row, before_column], taken[:, before_row, column]
        corner = taken[:, before_row, before_column]
        from_above = alike(corner, left) & ~alike(corner, upper)
        from_above = (from_above | (column == 0).to(grid.device)) & (row > 0).to(grid.device)
        predicted, own = torch.where(from_above[..., None], upper, left), grid[:, row, column]
        same = alike(own, predicted)
        keep[:, row, column] = ~same
        taken[:, row, column] = torch.where(same[..., None], predicted, own)
    return keep
