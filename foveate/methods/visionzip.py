"""VisionZip: keep the tokens the encoder attends to, and merge the rest into a few by likeness.

Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv:2412.04467 (CVPR 2025). Reference code: dvlab-research/VisionZip @ 3151f6d.
Differs from the reference: what is sent on are visual tokens of the model, so that the class
token's own feature, which the release puts first and counts among the dominant ones, is not, and
one more patch takes its place; the tiles of an image share one budget; any depth of encoder works.
Like the release it merges what the projector is given, where that makes one token of each row;
where it mixes rows, which the release does not serve, tokens are merged after it. Attention
received from all tokens replaces the class token's where there is none: that is the paper's rule,
the release has no such path. That the published counts (54 + 10 of 64, and in proportion) hold for
any budget is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
from foveate.core.fields import Natural
from foveate.core.ranking import highest, top
from foveate.errors import BudgetError


@register(
    "visionzip",
    stage="pre_llm",
    does="keeps most attended, merges rest",
    needs=("encoder_keys",),
    paper="Yang et al. 2024, arXiv:2412.04467",
)
@dataclass(frozen=True)
class VisionZip(Method):
    """Keep dominant tokens, and merge all others into contextual tokens.

    Args:
        keep: what survives, dominant and contextual tokens together. Shares are rounded half to
            even.
        contextual: how many of them are contextual; `None` for 5 of 32, which is the published 10
            of 64. Dominant tokens are the rest.
        positions: `None` gives survivors consecutive positions (`renumbered`), dominant tokens
            before contextual ones, as the reference does, where positions are single numbers;
            `original` leaves them where they were, contextual ones at their targets.

    Cost: attention scores of one encoder layer, and one product of the other tokens' keys with
    those of the contextual ones.
    """

    keep: Keep = 64
    contextual: Natural | None = None
    positions: Positions | None = None
    rounding = round
    field_errors = {"contextual": BudgetError}  # noqa: RUF012

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction around the projector, scored in the layer that the language model sees."""
        ranking = "cls_attention" if model.class_token else "received_attention"
        layer = (model.feature_layer,)
        needs = (Need(ranking, layer), Need("encoder_keys", layer))
        return (Step("pre_llm", needs=needs, before_projector=True),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Class-token attention summed over heads, or attention received: (G, V)."""
        if "cls_attention" in tokens.signals:
            return tokens.signal("cls_attention")[:, 0].float().sum(1)
        return tokens.signal("received_attention")[:, 0].float()

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the dominant tokens in raster order, and after them the contextual ones.

        Raises:
            BudgetError: the budget has no room for so many contextual tokens.
        """
        contextual = round(count * 5 / 32) if self.contextual is None else self.contextual
        if contextual > count:
            raise BudgetError(
                f"visionzip keeps {count} tokens of an image, so that {contextual} of them cannot "
                "be contextual; lower contextual, or keep more"
            )
        scores = self.scores(tokens)
        dominant = top(scores, count - contextual)
        if not contextual:
            return Reduction(dominant)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, dominant, True)
        # Newlines between tiles are no patches of the image: they are merged into nothing.
        rest = ~taken & ~scores.isneginf()
        targets = _targets(taken, rest, contextual)
        keys = F.normalize(tokens.signal("encoder_keys")[:, 0].float().mean(1), dim=-1)
        others = rest.scatter(1, targets, False)
        return _merge(dominant, targets, _nearest(keys, targets), others)


def _targets(taken: Tensor, rest: Tensor, count: int) -> Tensor:
    """(G, M) evenly spaced ones of the patches that are not taken, in raster order."""
    # A stable sort of these numbers lists the patches first, and keeps them in raster order.
    order = (2 * taken.int() - rest.int()).argsort(dim=1, stable=True)
    stride = (rest.sum(1, keepdim=True) // count).clamp(min=1)
    return order.gather(1, torch.arange(count, device=rest.device) * stride)


def _nearest(keys: Tensor, targets: Tensor) -> Tensor:
    """(G, V) which of the M targets each token's key of unit length is most like."""
    rows = keys.gather(1, targets[..., None].expand(-1, -1, keys.shape[-1]))
    return highest(keys @ rows.mT, 1.0)


def _merge(dominant: Tensor, targets: Tensor, nearest: Tensor, others: Tensor) -> Reduction:
    """Dominant tokens as they are; targets plus the mean of the others nearest to them, as
    released: the weights of a contextual token sum to two.
    """
    first, members = dominant.shape[1], others.float()
    counts = members.new_zeros(targets.shape).scatter_add(1, nearest, members)
    share = members / counts.gather(1, nearest).clamp(min=1)
    index = torch.cat((dominant, targets), 1)
    own = torch.arange(index.shape[1], device=index.device).expand_as(index)
    slot = torch.where(others, nearest + first, -1).scatter(1, index, own)
    share = share.scatter(1, index, 1.0)
    return Reduction(index, slot=slot, share=share, ordered=True)
