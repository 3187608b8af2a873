"""FEATHER: rank without positions, add a uniform grid, and cut once more, harder, later.

Paper: Endo et al., "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model
Acceleration", arXiv:2412.13180 (ICCV 2025). Reference code: markendo/FEATHER @ c2a09b2.
Differs from the reference: any batch, several images, grids that are not square and grouped-query
attention work; each image has its own budget; at least one token of an image survives. Where tokens
lie in one line without a grid, as tiles of LLaVA-NeXT do, every `stride`-th token is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Adaptive,
    Keep,
    PerRequest,
    Positions,
    Reduction,
    Scheduled,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.budget import check_keep, steps_in
from foveate.core.budget import count as budget_count
from foveate.core.fields import Natural, Positive
from foveate.core.ranking import marked, top
from foveate.core.transfer import members_of


@register(
    "feather",
    stage="llm",
    does="position-free attention and a grid",
    needs=("content_attention",),
    paper="Endo et al. 2024, arXiv:2412.13180",
)
@dataclass(frozen=True)
class Feather(Scheduled, Adaptive):
    """Rank visual tokens by the last prompt token's attention as it would be without rotary
    positions, and add every `stride`-th token of every `stride`-th row at the first drop.

    Args:
        layers: decoder layers before which tokens are dropped, ascending, from 1; the layer before
            each ranks. `None` scales the published (8, 16) of 32 layers to the model at hand.
        keep: q = 1 - r of the release: the share that attention keeps at the first drop; the grid
            comes on top. Later drops keep q² of what is left then, grid tokens treated as all
            others. A schedule gives the share of the ORIGINAL count of each drop instead. Shares
            are truncated.
        stride: distance of grid tokens in rows and columns. `None` leaves the grid out, and every
            drop keeps q of what is left: the release's FastV without rotary positions.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: one key projection of all tokens and one query row per drop; no attention map.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = 0.3
    stride: Positive | None = 3
    positions: Positions | None = None
    published_positions = "original"
    published_layers = (8, 16)
    ranked_before = 1
    rounding = math.trunc

    @property
    def drop_count(self) -> int:
        """The published number, unless `keep` is a schedule."""
        entries = steps_in(self.keep)
        return entries if entries > 1 else len(self.published_layers)

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`; only a schedule has one entry for each of `layers`.

        Raises:
            BudgetError: `keep` is out of range or does not fit.
        """
        check_keep(self.keep, self.step_count if steps_in(self.keep) > 1 else None)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """Tokens that attention keeps of one image."""
        if steps_in(self.keep) > 1:
            return super().count(remaining, total, step, number, row)
        share = self.keep.values[row] if isinstance(self.keep, PerRequest) else self.keep
        if number and self.stride and isinstance(share, float):
            share *= share
        return budget_count(share, remaining, step=0, row=0, rounding=type(self).rounding)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the last token without rotary positions, averaged over heads: (G, V)."""
        return tokens.signal("content_attention")[:, 0].mean(1)

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Keep what attention ranks highest; at the first drop, the grid as well."""
        scores = self.scores(tokens)
        best = top(scores, tokens.quota)
        if tokens.number or not self.stride:
            return [(range(len(best)), Reduction(best))]
        surviving = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        surviving |= (tokens.coordinates % self.stride == 0).all(-1)
        return [
            (members, Reduction(marked(members_of(surviving, members), count)))
            for count, members in by_count(surviving.sum(1)).items()
        ]
