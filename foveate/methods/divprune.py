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
from foveate.ops.diversity import cosine_distance, select_diverse


@register(
    "divprune",
    stage="pre_llm",
    does="keeps tokens far apart",
    paper="Alvar et al. 2025, arXiv:2503.02175",
)
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
