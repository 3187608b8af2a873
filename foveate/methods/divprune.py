"""DivPrune: keep tokens that are as far from each other as possible.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
arXiv:2503.02175 (max-min diversity, solved greedily). Reference code: vbdi/divprune @ 799e2d9,
whose licence is non-commercial (CC BY-NC 4.0): written from the equations, nothing is taken.
Differs from the reference: any batch and several images work; distances are taken in float32 at
least; tokens of zero length count as orthogonal to all others instead of becoming NaN; a picked
token is never picked again, also when all tokens are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.budget import Keep
from foveate.method import Method, ModelFacts, Positions, Step, register
from foveate.reduction import Reduction
from foveate.tokens import VisualTokens


@register("divprune", stage="pre_llm", paper="Alvar et al. 2025, arXiv:2503.02175")
@dataclass(frozen=True)
class DivPrune(Method):
    """Pick tokens greedily, each as far as possible from those already picked.

    Args:
        keep: what survives (the release's `SUBSET_RATIO`); shares are rounded half to even.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: one V x V product of the token features, O(V²·D), and O(K·V) comparisons.
    """

    keep: Keep = 0.098
    positions: Positions | None = None
    rounding = round

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing but the features."""
        return (Step("pre_llm"),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` most diverse tokens of each image, in raster order."""
        order = select_diverse(cosine_distance(tokens.x), count)
        return Reduction(order.sort(dim=-1).values)


def cosine_distance(x: Tensor) -> Tensor:
    """Cosine distance of all pairs of tokens, in float32 or better.

    Args:
        x: (G, V, D) token values.

    Returns:
        (G, V, V) one minus the cosine; tokens of zero length have distance 1 to all.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm.masked_fill(norm == 0, 1)
    cosine = unit @ unit.mT
    return torch.sub(cosine.new_ones(()), cosine, out=cosine)


def select_diverse(distance: Tensor, count: int) -> Tensor:
    """Greedy max-min selection.

    The first pick is the token whose nearest other token is farthest away; every further pick is
    the token farthest from the picked set. The lower index wins ties.

    Args:
        distance: (G, V, V) pairwise distances. Its diagonal is overwritten.
        count: tokens to pick, K, from 1 to V.

    Returns:
        (G, K) token positions in the order of their selection.
    """
    images = torch.arange(len(distance), device=distance.device)
    # A token's distance to itself is its smallest, so the second smallest is its nearest neighbour.
    near = distance.topk(min(2, distance.shape[-1]), dim=1, largest=False).values[:, -1]
    picks = [near.argmax(dim=-1)]
    # With this diagonal the running minimum of a picked token can never win again.
    distance.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = distance[images, picks[0]]
    for _ in range(count - 1):
        picks.append(nearest.argmax(dim=-1))
        torch.minimum(nearest, distance[images, picks[-1]], out=nearest)
    return torch.stack(picks, dim=-1)
