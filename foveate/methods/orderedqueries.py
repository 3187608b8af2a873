"""Ordered queries: learned queries of which any first few stand for the image.

Paper: Miwa et al., "One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
arXiv:2501.10064, whose tail drop is applied here to what a language model is shown: training keeps
a random number of the first tokens, so that what matters most comes first. One-D-Piece makes
images. How its idea serves to understand them is our reading, and no release is followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from foveate.errors import BudgetError
from foveate.io.quoting import quoted
from foveate.ops.learning import flops_of, untrained
from foveate.ops.pooling import cells_of, with_rest

SIDE = 16  # of the grid on which places are learned
SHARP = 4.0  # by how much a query prefers its cell at first, in logits


class Queries(nn.Module):
    """Queries that attend to a grid, each with a place on it and a content.

    At first they are the cells of a pyramid: the whole grid, its quarters, their quarters, and so
    on; and they mix the tokens as they are.

    Args:
        width: D, of tokens.
        count: queries.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.place = nn.Parameter(SHARP * _pyramid(count))
        self.query = nn.Parameter(torch.zeros(count, width))
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
        """The first `count` queries on (G, V, D) tokens of a grid.

        Returns:
            (G, K, D) what they make of them, and (G, K, V) their attention.
        """
        normed = self.norm(x.to(self.norm.weight.dtype))
        place = F.interpolate(self.place[None, :count], grid, mode="bilinear").flatten(2)
        scores = self.query[:count] @ self.key(normed).mT * x.shape[-1] ** -0.5
        weights = (scores + place).softmax(-1)
        made = weights @ x.to(weights) + self.value(weights @ normed)
        return made.to(x.dtype), weights


@register(
    "ordered-queries",
    stage="pre_llm",
    does="first of its learned queries",
    paper="after Miwa et al. 2025, arXiv:2501.10064",
)
@dataclass(frozen=True)
class OrderedQueries(Learning):
    """Show the language model what the first learned queries make of an image.

    Args:
        queries: how many there are; training draws how many of the first are used, evenly.
        keep: how many of the first are used in inference, at most `queries`.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` spreads them evenly over those of the image.

    Cost: one projection of the tokens, 2 V D^2, and 4 K V D of attention.
    """

    queries: Positive = 64
    keep: Positive = 64
    positions: Positions | None = None
    note = "ordered-queries shows what its queries make, which are to be trained (foveate.prepare)"

    def check_budget(self, steps: int | None) -> None:
        """There are as many queries as are kept.

        Raises:
            BudgetError: `keep` is no count, or more than `queries`.
        """
        super().check_budget(steps)
        if not isinstance(self.keep, int) or self.keep > self.queries:
            raise BudgetError(
                f"keep must be a number of the first {quoted(self.queries)} queries, got "
                f"{quoted(self.keep)} in ordered-queries"
            )

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing but the features."""
        return (Step("pre_llm", whole=True, merges=True),)

    def learned(self, model: ModelFacts) -> Queries:
        """The queries."""
        return untrained(lambda: Queries(model.text_width, self.queries))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the queries cost, counted on the meta device."""
        if self.keep >= tokens:
            return 0
        rows = tokens // grid[1]  # of all frames
        cells = rows * grid[1]
        count = max(1, min(self.keep, cells) - (tokens - cells))
        learned = self.learned(model).to("meta")
        x = torch.empty(1, cells, model.text_width, device="meta")
        return flops_of(lambda: learned(x, (rows, grid[1]), count))

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """What the first `count` queries make of each image.

        Raises:
            InputError: the tokens are not a whole grid.
        """
        cells, (height, width) = cells_of(tokens, self.slug), tokens.grid
        count = max(1, min(count, cells) - (tokens.count - cells))
        learned: Any = tokens.learned
        made, weights = learned(tokens.x[:, :cells], (tokens.frames * height, width), count)
        spread = torch.arange(count, device=made.device) * cells // count
        made = Reduction(spread.expand(len(made), -1), weights, values=made)
        return with_rest(made, tokens, cells)

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """The same with a number of queries that is drawn, the same for all images of a forward.

        Raises:
            InputError: the tokens are not a whole grid.
        """
        if self.slug not in training.memory:
            training.memory[self.slug] = int(torch.randint(1, self.queries + 1, ()))
        drawn = min(training.memory[self.slug], tokens.count)
        return self.reduce(tokens, drawn)


def _pyramid(count: int) -> Tensor:
    """(count, SIDE, SIDE) which tokens belong to the first cells of a pyramid of quarters."""
    cells: list[Tensor] = []
    side = 1
    while len(cells) < count:
        edge = max(1, SIDE // side)
        for cell in range(min(side, SIDE) ** 2):
            row, column = divmod(cell, min(side, SIDE))
            place = torch.zeros(SIDE, SIDE)
            place[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] = 1.0
            cells.append(place)
        side *= 2
    return torch.stack(cells[:count])
