"""IDPruner: keep important tokens, each unlike those that are kept already.

Paper: Tan et al., "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for
MLLMs", arXiv:2602.13315 (maximal marginal relevance). Reference code: Tencent/AngelSlim @ 67394ce,
token_compressor/algorithm/idpruner.py. The release takes importance from a selector that is trained
for each model and downloaded with its code, and needs no attention. That importance is the
encoder's attention here is our reading; how importance and likeness are weighed is the release's.
Differs from the reference: any batch works; importance is scaled to [0, 1] whatever its unit
(there: 1e-6 is added to its range, which suits the selector's scores); constant importance leaves
pure diversity, from the first token on; newlines between tiles come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Positions,
    Reduction,
    VisualTokens,
    register,
)
from foveate.core.fields import UnitFloat
from foveate.core.ranking import highest, near_of
from foveate.ops.diversity import normalize
from foveate.ops.saliency import Salient, saliency


@register(
    "idpruner",
    stage="pre_llm",
    does="important, unlike others kept",
    needs=("cls_attention", "received_attention"),
    paper="Tan et al. 2026, arXiv:2602.13315",
)
@dataclass(frozen=True)
class IDPruner(Salient):
    """Pick tokens greedily by importance, less the largest cosine to one already picked.

    Importance is the class token's attention to patches in the layer that is read, scaled to
    [0, 1]; without a class token, attention received there.

    Args:
        keep: what survives, 1 - ratio of the release; shares are rounded half to even.
        mmr_lambda: weight of importance, in [0, 1]; 1 minus it is that of likeness.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one V x V product of the token features, O(V²·D), and O(K·V) comparisons.
    """

    keep: Keep = 0.25
    mmr_lambda: UnitFloat = 0.5
    positions: Positions | None = None

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` tokens that are picked first, in raster order."""
        unit = normalize(tokens.x)
        importance = scaled(saliency(tokens, among_patches=True))
        order = select_marginal(unit @ unit.mT, importance, count, self.mmr_lambda)
        return Reduction(order.sort(dim=-1).values)


def scaled(scores: Tensor) -> Tensor:
    """(G, V) scores scaled to [0, 1] within each image; what is infinite is minus infinity."""
    finite = scores.isfinite()
    low = scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    span = scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True) - low
    flat = span <= near_of(low + span, None)  # rounding alone tells them apart
    result = ((scores - low) / span.masked_fill(flat, 1)).masked_fill(flat, 0.0)
    return result.masked_fill(~finite, -torch.inf)


def select_marginal(like: Tensor, importance: Tensor, count: int, weight: float) -> Tensor:
    """Greedy choice by importance and unlikeness.

    Args:
        like: (G, V, V) cosines.
        importance: (G, V) in [0, 1]; minus infinity for what is picked last.
        count: tokens to pick, K.
        weight: of importance, in [0, 1].

    Returns:
        (G, K) positions in the order of their selection.
    """
    images = torch.arange(len(like), device=like.device)
    last = importance.isneginf()
    importance = importance.masked_fill(last, 0.0)
    nearest = torch.full_like(importance, -1.0)
    below = torch.zeros_like(importance).masked_fill_(last, -4.0)  # any score is above -2
    score, picks = importance, []
    for _ in range(count):
        pick = highest(score + below, 1.0)
        picks.append(pick)
        below.scatter_(1, pick[:, None], -torch.inf)
        torch.maximum(nearest, like[images, pick], out=nearest)
        score = weight * importance - (1 - weight) * nearest
    return torch.stack(picks, dim=-1)
