"""ToDRE: keep a small, diverse part of the visual tokens, and none of them in late layers.

Paper: "ToDRE", arXiv:2505.18757; version 1 (k-center) and version 2 (max-sum). There is no public
code: written from the abstracts and public summaries.
Our reading, where those say nothing: distances are cosine distances of the projected tokens; the
first pick is the token whose distances to all others have the largest sum (or the first in raster
order); survivors keep the order of the image. Of stage 2 only the late layer is public, not how an
image's own layer is found from attention: here it is one layer for all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.budget import check_keep
from foveate.core.fields import Range
from foveate.ops.diversity import cosine_distance, select_diverse


@register(
    "todre",
    stage="pre_llm",
    does="diverse tokens, then none at all",
    paper="ToDRE 2025, arXiv:2505.18757",
)
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy diversity after the encoder, then no visual tokens from a late decoder layer on.

    Args:
        keep: what survives after the encoder; shares are truncated. 1.0 removes nothing, in the
            late layer neither.
        rule: `max-sum` adds the token with the largest sum of distances to those picked (version 2
            of the paper; it likes outliers), `k-center` the one farthest from its nearest pick
            (version 1; it covers the image).
        seed: first pick: `outlying`, the token with the largest sum of distances to all others, or
            `first`, the first in raster order.
        drop_layer: decoder layer before which all visual tokens are removed, the same for all
            images. `None` is three quarters of the model's depth, which is our reading: the paper
            finds a layer for each image, by a rule that is not published. -1 keeps them to the end.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one V x V product of the token features, O(V²·D), and O(K·V) comparisons.
    """

    keep: Keep = 0.1
    rule: Literal["max-sum", "k-center"] = "max-sum"
    seed: Literal["outlying", "first"] = "outlying"
    drop_layer: Annotated[int, Range(-1)] | None = None
    positions: Positions | None = None

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`, which speaks of the first step only."""
        check_keep(self.keep, 1)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A choice after the projector, and the removal of all that is left."""
        layer = self.drop_layer
        if layer is None:
            layer = max(3 * model.text_layers // 4, 1, model.first_llm_layer)
            layer = min(layer, model.last_llm_layer)
        return (Step("pre_llm"), *([] if layer == -1 else [Step("llm", layer)]))

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """`keep` after the encoder, nothing in the late layer."""
        if step.stage == "pre_llm":
            return super().count(remaining, total, step, number, row)
        keep = self.keep.values[row] if isinstance(self.keep, PerRequest) else self.keep
        return remaining if isinstance(keep, float) and keep == 1 else 0

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` most diverse tokens of each image, in raster order."""
        distance = cosine_distance(tokens.x)
        first = distance.sum(-1) if self.seed == "outlying" else -tokens.index
        gather = torch.add if self.rule == "max-sum" else torch.minimum
        order = select_diverse(distance, count, first, gather)
        return Reduction(order.sort(dim=-1).values)
