"""SCOPE: keep salient tokens that cover those which are not kept yet.

Paper: Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
arXiv:2510.24214 (NeurIPS 2025). Reference code: Tencent/AngelSlim @ 67394ce,
token_compressor/algorithm/scope.py, which serves encoders without a class token too. The authors'
own, kinredon/SCOPE @ 6bf7306, makes the same choice by the encoder's features, where this one
compares projected tokens, and takes a head's attention as it is, where this one takes shares of
what it gives to patches.
Differs from the reference: any batch works, and each image has its own budget (there: one choice
among the tokens of all images); attention of all queries counts, also of very many (there: from
6,144 patches on, that of their mean); where nothing is left to cover, the lower index wins (there:
what rounding says); newlines between tiles cover nothing and come last; tokens of zero length are
like no others (there: NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Positions,
    Reduction,
    VisualTokens,
    register,
)
from foveate.core.fields import Range
from foveate.core.ranking import TIE, highest
from foveate.ops.diversity import normalize
from foveate.ops.saliency import Salient, saliency


@register(
    "scope",
    stage="pre_llm",
    does="salient tokens covering others",
    needs=("cls_attention", "received_attention"),
    paper="Deng et al. 2025, arXiv:2510.24214",
)
@dataclass(frozen=True)
class SCOPE(Salient):
    """Pick tokens greedily, each by what it adds to the coverage of all tokens, times saliency.

    A token is covered as far as a kept one is like it, by cosine. Saliency is the class token's
    attention to patches in the layer that is read; without a class token, attention received there.

    Args:
        keep: what survives, 1 - ratio of the release; shares are rounded half to even.
        alpha: exponent of saliency; 0 looks at coverage alone.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one V x V product of the token features, O(V²·D). A pick then updates only what it covers
    better than those before it, about V / k tokens for the k-th pick: O(V²·log K) in all.
    """

    keep: Keep = 0.25
    alpha: Annotated[float, Range(0)] = 1.0
    positions: Positions | None = None

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the `count` tokens that are picked first, in raster order."""
        seen = saliency(tokens, among_patches=True)
        newline = seen.isneginf()
        weight = torch.where(newline, 0.0, seen.clamp(min=0) ** self.alpha)
        unit = normalize(tokens.x)
        order = select_covering(unit @ unit.mT, weight, newline, count)
        return Reduction(order.sort(dim=-1).values)


def select_covering(like: Tensor, weight: Tensor, newline: Tensor, count: int) -> Tensor:
    """Greedy choice by weighted gain in coverage.

    Args:
        like: (G, V, V) how like each other tokens are, at most 1.
        weight: (G, V) what a token's gain is multiplied by.
        newline: (G, V) tokens that need no cover, and that are picked last.
        count: tokens to pick, K.

    Returns:
        (G, K) positions in the order of their selection.
    """
    images = torch.arange(len(like), device=like.device)
    covered = torch.zeros_like(weight, dtype=like.dtype).masked_fill_(newline, torch.inf)
    least = covered[..., None] + TIE
    gain = torch.where(like > least, like, 0.0).sum(1, dtype=torch.float64)
    rank = torch.zeros_like(gain)  # above all newlines, which are above what is picked
    rank = rank.masked_fill_(newline, -1.0)
    picks = []
    for _ in range(count):
        pick = highest(torch.where(rank == 0, gain.clamp(min=0) * weight, rank))
        picks.append(pick)
        rank.scatter_(1, pick[:, None], -torch.inf)
        before, row = covered, like[images, pick]
        covered = torch.maximum(before, row)
        _cover(gain, like, before, covered)
    return torch.stack(picks, dim=-1)


def _cover(gain: Tensor, like: Tensor, before: Tensor, after: Tensor) -> None:
    """Update the (G, V) gains of tokens once others are covered better, in place."""
    if like.device.type != "cpu":  # where to find the few that are would hold up the device
        gain += (_gain(like, after[..., None]) - _gain(like, before[..., None])).sum(1)
        return
    image, token = (after > before).nonzero(as_tuple=True)
    rows = like[image, token]
    now, once = (covered[image, token, None] for covered in (after, before))
    gain.index_add_(0, image, _gain(rows, now) - _gain(rows, once))


def _gain(like: Tensor, covered: Tensor) -> Tensor:
    """How much better a token is covered, in float64, so that updates add up to what a sum anew
    would be; what rounding alone tells from nothing is nothing.
    """
    more = like.double() - covered
    return torch.where(more > TIE, more, 0.0)
