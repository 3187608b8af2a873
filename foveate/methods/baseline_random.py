"""Random: the baseline that keeps a random subset of the visual tokens.

Every accuracy table needs it at the same token count: a method that does not beat it has not
found out which tokens matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Keep, ModelFacts, Positions, Scorer, Step, VisualTokens, register
from foveate.core.fields import Natural
from foveate.core.transfer import upload


@register("random", stage="pre_llm", does="keeps a random subset", paper="baseline")
@dataclass(frozen=True)
class Random(Scorer):
    """Keep a random subset, the same for all images of equal token count.

    Args:
        keep: what survives, as a share (rounded down) or a count.
        seed: seed of the choice, 0 or more; a smaller `keep` with the same seed keeps a subset.
        positions: `None` gives survivors consecutive positions (`renumbered`),
            where positions are single numbers; `original` leaves them where they were.

    Cost: one permutation of V numbers.
    """

    keep: Keep = 0.25
    seed: Natural = 0
    positions: Positions | None = None

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing."""
        return (Step("pre_llm"),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """A random permutation of 0 to V-1, equal for the G images: (G, V)."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(tokens.count, generator=generator)
        return upload(order, tokens.index.device).expand_as(tokens.index)
