"""M3: train one model on nested grids of visual tokens, and pick the scale when asking.

Paper: Cai et al., "Matryoshka Multimodal Models", arXiv:2405.17430 (ICLR 2025). Reference code:
mu-cai/matryoshka-mm @ ec30cd3: average pooling of the projected grid, and the mean of the losses of
all scales in each training step.
Differs from the reference: grids need not be square; the output of a training step holds the logits
of the finest scale, where the release puts those of all scales one after the other; a scale whose
kernel does not divide the grid is refused in training, where the release trains with another count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foveate.core import (
    Learning,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    TrainingPass,
    VisualTokens,
    register,
)
from foveate.core.fields import Positive
from foveate.core.ranking import marked
from foveate.errors import BudgetError, InputError
from foveate.io.quoting import quoted
from foveate.ops.pooling import cells_of, with_rest


@register(
    "m3",
    stage="pre_llm",
    does="averages the grid to a scale",
    paper="Cai et al. 2024, arXiv:2405.17430",
)
@dataclass(frozen=True)
class M3(Learning):
    """Average-pool the token grid of each image, or of each frame, to a scale.

    Training costs one forward and backward for each scale. A model that was not trained so loses
    much at small scales.

    Args:
        scales: tokens of each grid that the model is trained with, all in each step, finest first;
            those of LLaVA-1.5, by default.
        keep: the scale: tokens of each grid; `None` keeps all. Of the 27 x 27 grid, 100 keeps 169:
            the kernel is the whole part of the root of 7.29.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` gives each that of the token at the
            centre of its cell.

    Cells of tokens that lie on no grid, as those of tiles with newlines, are runs of neighbours.

    Cost: an average of the features; none of attention.
    """

    scales: tuple[Positive, ...] = (576, 144, 36, 9, 1)
    keep: Positive | None = None
    positions: Positions | None = None
    note = "m3 pools the grid, which costs accuracy on models that were not trained with it"

    def check_fields(self) -> None:
        """As in `Method`; there are scales.

        Raises:
            FoveateError: a field does not fit.
        """
        super().check_fields()
        if list(self.scales) != sorted({*self.scales}, reverse=True) or not self.scales:
            raise BudgetError(
                f"scales must be numbers of tokens, finest first, got {quoted(self.scales)} in m3"
            )

    def check_budget(self, steps: int | None) -> None:
        """A number of tokens, or none.

        Raises:
            BudgetError: `keep` is something else.
        """
        if self.keep is not None:
            super().check_budget(steps)

    @property
    def passes(self) -> int:
        """One for each scale."""
        return len(self.scales)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing."""
        return (Step("pre_llm", whole=True, merges=True),)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """The scale, or what the kernel makes of it on a square grid."""
        side = math.isqrt(total)
        if self.keep is None or self.keep >= remaining:
            return remaining
        if side * side != total:
            return self.keep
        return (side // _kernel(total, self.keep)) ** 2

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Pool every grid to the scale.

        Raises:
            InputError: the tokens are not whole grids.
        """
        height, width = tokens.grid
        return _pooled(tokens, height * width if self.keep is None else self.keep)

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """Pool every grid to the scale of this pass.

        Raises:
            InputError: the tokens are not whole grids, or the scale does not divide them.
        """
        scale, (height, width) = self.scales[training.number], tokens.grid
        reduction = _pooled(tokens, scale)
        rest = tokens.count - tokens.frames * height * width
        if reduction.kept - rest != scale * tokens.frames:
            made = (reduction.kept - rest) // tokens.frames
            raise InputError(
                f"m3 is to train with {scale} tokens of a grid of {height} x {width}, which square "
                f"cells cannot make: they make {made}; give scales that divide the grid"
            )
        return reduction


def _kernel(total: int, scale: int) -> int:
    """Side of the cells that are averaged."""
    return max(1, math.isqrt(total // scale))


def _pooled(tokens: VisualTokens, scale: int) -> Reduction:
    """The mean of each cell; rows and columns that make no whole cell are left out."""
    cells = cells_of(tokens, "m3")
    height, width = tokens.grid
    tall = wide = min(_kernel(height * width, scale), height, width)
    if height == 1:  # tokens that lie on no grid
        wide = max(1, width // scale)
    rows, columns = height // tall, width // wide
    row, column = tokens.coordinates[:, :cells].unbind(-1)
    slot = (tokens.frame[:, :cells] * rows + row // tall) * columns + column // wide
    slot = slot.masked_fill((row >= rows * tall) | (column >= columns * wide), -1)
    centre = (row % tall == (tall - 1) // 2) & (column % wide == (wide - 1) // 2) & (slot >= 0)
    index = tokens.index.gather(1, marked(centre, tokens.frames * rows * columns))
    return with_rest(Reduction.mean(index, slot), tokens, cells)
