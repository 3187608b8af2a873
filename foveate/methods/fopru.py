"""FoPru: keep the tokens, or the rows of tokens, that stand out in the encoder's attention.

Paper: Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models",
arXiv:2411.14164. The authors published no code: the two strategies and the raster order are the
abstract's; the significance (attention received or given, whichever varies more) and the count of
rows follow a third party's implementation and are our reading.
Beyond it: any batch, grids that are not square, and encoders without a class token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.ranking import top
from foveate.errors import BudgetError, InputError


@register(
    "fopru",
    stage="pre_llm",
    does="tokens or rows that stand out",
    needs=("received_attention", "given_attention"),
    paper="Jiang et al. 2024, arXiv:2411.14164",
)
@dataclass(frozen=True)
class FoPru(Method):
    """Rank tokens by encoder attention among patches, one by one or row by row of the grid.

    Args:
        keep: what survives. With `rank`, a share of the tokens (rounded down, but one at least) or
            their count. With `row`, a share of the rows (rounded down); a count of tokens keeps the
            whole rows that fit in it. A budget in which no row fits is refused.
        strategy: `rank` keeps the best tokens anywhere, `row` the best complete rows.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: the attention logits of one encoder layer, summed up in chunks.
    """

    keep: Keep = 0.25
    strategy: Literal["rank", "row"] = "rank"
    positions: Positions | None = None
    rounding = math.floor

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, scored in the layer that the language model sees."""
        names = ["received_attention", "given_attention"]
        if model.class_token:
            names.append("cls_attention")
        layer = (model.feature_layer,)
        needs = tuple(Need(name, layer) for name in names)
        return (Step("pre_llm", needs=needs, whole=self.strategy == "row"),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the best tokens, or rows, of each image, in raster order.

        Raises:
            InputError: whole rows are wanted, but an earlier method has removed parts of them.
            BudgetError: not even one row fits into the budget.
        """
        scores = self.scores(tokens)
        if self.strategy == "rank":
            return Reduction.top(scores, count)
        height, width = tokens.grid
        total = tokens.frames * height * width
        if tokens.count < total:
            raise InputError(
                "fopru with strategy='row' keeps whole rows, but an earlier method has removed "
                "tokens of them; let it act first, or use strategy='rank'"
            )
        if count < width:
            raise BudgetError(
                f"fopru with strategy='row' is to keep {count} tokens of an image whose rows have "
                f"{width}; keep more, or use strategy='rank'"
            )
        sums = scores[:, :total].unflatten(1, (-1, width)).sum(-1)
        rows = top(sums, min(count // width, sums.shape[1]))
        columns = torch.arange(width, device=rows.device)
        return Reduction((rows[..., None] * width + columns).flatten(1))

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention that each token receives from patches, or gives to them: (G, V).

        Of each image it is the one with the larger variance over its tokens. Tokens that are no
        patches have -inf.
        """
        seen = tokens.signal("received_attention")[:, 0].float()
        received = seen.clamp(min=0)
        given = tokens.signal("given_attention")[:, 0].float().clamp(min=0)
        first = torch.zeros_like(given)
        if "cls_attention" in tokens.signals:
            first = tokens.signal("cls_attention")[:, 0].float().mean(1).clamp(min=0)
        # What patches receive is what patches and the class token give, so that the number of
        # queries, over which `received` is a mean, follows from the three sums.
        total = (given + first).sum(-1, keepdim=True)
        queries = total / received.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
        received = received * queries - first
        # Both now have the same sum, so that the larger sum of squares has the larger variance.
        squares = ((received - given) * (received + given)).sum(-1, keepdim=True)
        scores = torch.where(squares > 0, received, given)
        return scores.masked_fill(seen == -torch.inf, -torch.inf)
