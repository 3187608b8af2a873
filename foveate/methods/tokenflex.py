"""TokenFLEX: train one model with numbers of visual tokens that are drawn at random.

Paper: Hu et al., "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference",
arXiv:2504.03154. No code was released: what is here is our reading. The paper's projector pools the
encoder's grid adaptively, and then a SwiGLU weighs features for each count. Here the model's own
projector stays before the pooling, and the SwiGLU is added to what was pooled. It begins as
nothing, so that training goes on from the model there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import (
    Adaptive,
    Learning,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    TrainingPass,
    VisualTokens,
    register,
)
from foveate.core.fields import Positive, UnitFloat
from foveate.errors import BudgetError, InputError
from foveate.io.quoting import quoted
from foveate.ops.learning import flops_of, untrained
from foveate.ops.pooling import cells_of, pool_cells, with_rest


class SwiGLU(nn.Module):
    """A norm, and a gated MLP that is added to what it is given.

    Args:
        width: of tokens.
        inner: of the MLP.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) tokens and what the MLP makes of them."""
        normed = self.norm(x.to(self.norm.weight.dtype))
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed)).to(x.dtype)


@register(
    "tokenflex",
    stage="pre_llm",
    does="averages the grid, count drawn",
    paper="Hu et al. 2025, arXiv:2504.03154",
)
@dataclass(frozen=True)
class TokenFLEX(Learning, Adaptive):
    """Pool the token grid of each image, or frame, to n x n, where training draws n, and pass a
    SwiGLU.

    Tokens that lie on no grid, as those of tiles with newlines, are pooled as one row.

    Args:
        counts: tokens of an image, all squares; training draws one of them for each forward.
        chances: how often each is drawn, in the order of `counts`; they sum to 1.
        expansion: width of the SwiGLU, in widths of a token.
        keep: tokens of each image, any square number; `None` is the largest of `counts`.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` gives each that of the token at the centre of its cell.

    Cost: an average of the features, and the SwiGLU of those that stay, 6 K D^2 `expansion`.
    """

    counts: tuple[Positive, ...] = (64, 144, 256)
    chances: tuple[UnitFloat, ...] = (0.2, 0.3, 0.5)
    expansion: Positive = 1
    keep: Positive | None = None
    positions: Positions | None = None
    note = "tokenflex has a projector of its own, which is to be trained (foveate.prepare)"

    def check_fields(self) -> None:
        """As in `Method`; counts are squares, and chances are of them.

        Raises:
            FoveateError: a field does not fit.
        """
        super().check_fields()
        for count in self.counts:
            _check_square(count)
        if len(self.chances) != len(self.counts) or not math.isclose(sum(self.chances), 1):
            raise BudgetError(
                f"tokenflex needs a chance for each of its counts {self.counts}, which sum to 1, "
                f"got {self.chances}"
            )

    def check_budget(self, steps: int | None) -> None:
        """A square number of tokens, or none.

        Raises:
            BudgetError: `keep` is something else.
        """
        super().check_budget(steps)
        if isinstance(self.keep, int):
            _check_square(self.keep)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing."""
        return (Step("pre_llm", whole=True, merges=True),)

    def learned(self, model: ModelFacts) -> SwiGLU:
        """The SwiGLU."""
        return untrained(lambda: SwiGLU(model.text_width, self.expansion * model.text_width))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the SwiGLU costs, counted on the meta device."""
        frames = max(1, tokens // (grid[0] * grid[1]))
        each = tokens // frames
        kept = frames * self.count(each, each, step, 0)
        learned = self.learned(model).to("meta")
        return flops_of(lambda: learned(torch.empty(1, kept, model.text_width, device="meta")))

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As asked; of images with fewer tokens, the largest square."""
        return _fitting(max(self.counts) if self.keep is None else self.keep, remaining)

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Pool each image, and let the SwiGLU add to it.

        Raises:
            InputError: the tokens are not whole grids, or too few.
        """
        each = tokens.count // tokens.frames
        count = self.count(each, each, tokens.step, 0)
        return [(range(len(tokens.index)), self._pooled(tokens, count))]

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """The same with a number of tokens that is drawn, the same for all images of a forward.

        Raises:
            InputError: the tokens are not whole grids, or too few.
        """
        drawn = training.memory.get(self.slug)
        if drawn is None:
            which = torch.multinomial(torch.tensor(self.chances), 1).item()
            drawn = training.memory[self.slug] = self.counts[int(which)]
        return self._pooled(tokens, _fitting(drawn, tokens.count // tokens.frames))

    def _pooled(self, tokens: VisualTokens, count: int) -> Reduction:
        cells = cells_of(tokens, self.slug)
        (height, width), side, learned = tokens.grid, math.isqrt(count), tokens.learned
        rows, columns = (1, count) if height == 1 else (side, side)
        if rows > height or columns > width:
            raise InputError(
                f"tokenflex pools a grid to {rows} x {columns} tokens, but an image has {height} x "
                f"{width}; give a smaller keep"
            )
        pooled = pool_cells(tokens, rows, columns)
        made: Any = pooled.apply(tokens.x[:, :cells])
        if learned is not None:
            pooled = replace(pooled, values=learned(made))
        return with_rest(pooled, tokens, cells)


def _check_square(count: int) -> None:
    if math.isqrt(count) ** 2 != count:
        raise BudgetError(f"tokenflex pools to n x n tokens, of which {quoted(count)} is no number")


def _fitting(count: int, available: int) -> int:
    """The number of tokens, or of fewer the largest square."""
    return count if count <= available else math.isqrt(available) ** 2
