"""VisPruner: keep what the encoder attends to, and of the rest what is not a repetition.

Paper: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
Pruning in VLMs", arXiv:2412.01818 (ICCV 2025; FasterVLM is its first version). Reference code:
Tencent/AngelSlim @ 67394ce, token_compressor/algorithm/vispruner.py, which serves encoders without
a class token too. The authors' own, Theia-4869/VisPruner @ aefa01a, compares the encoder's features
where this one compares projected tokens, and cuts the rest in halves by rank of attention where
this one does so in raster order. We follow the latter: rounding cannot change the halves.
Differs from the reference: any batch works; attention of all queries counts, also of very many
(there: from 6,144 patches on, that of their mean); ties go to the lower index (there: unspecified);
newlines between tiles are the first to go of the rest.
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
from foveate.core.ranking import marked, top
from foveate.core.reduction import take_rows
from foveate.ops.diversity import normalize
from foveate.ops.saliency import Salient, saliency

AT_ONCE = 8
"""Tokens that are dropped between two comparisons; fixed in the release."""


@register(
    "vispruner",
    stage="pre_llm",
    does="attended, without repetitions",
    needs=("cls_attention", "received_attention"),
    paper="Zhang et al. 2024, arXiv:2412.01818",
)
@dataclass(frozen=True)
class VisPruner(Salient):
    """Keep important tokens by attention, and diverse ones by dropping repetitions.

    The tokens that are not important are cut in two halves, every second one in each. Those of the
    first half that are most like some token of the second are dropped, eight at a time; then the
    rest is cut in halves anew, until the budget is met.

    Args:
        keep: what survives, important and diverse tokens together; shares are rounded half to even.
        important_ratio: share of them that is important, rounded half to even; one at least is
            diverse, if two are kept.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one V x V product of the token features, O(V²·D), and V² / 2 comparisons for every eight
    tokens that are dropped.
    """

    keep: Keep = 0.25
    important_ratio: UnitFloat = 0.5
    positions: Positions | None = None

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` important and diverse tokens, in raster order."""
        seen = saliency(tokens, among_patches=True)
        important = round(count * self.important_ratio)
        if count > 1:
            important = min(important, count - 1)
        index = top(seen, important)
        if important < count:
            others = torch.ones_like(seen, dtype=torch.bool).scatter(1, index, False)
            rest = marked(others, tokens.count - important)
            if rest.shape[1] > count - important:
                unit = normalize(tokens.x)
                rest = drop_repetitions(unit @ unit.mT, rest, count - important, seen.isneginf())
            index = torch.cat((index, rest), 1).sort(dim=-1).values
        return Reduction(index)


def drop_repetitions(like: Tensor, rest: Tensor, count: int, newline: Tensor) -> Tensor:
    """Drop tokens that are like others, a few at a time.

    Args:
        like: (G, V, V) cosines.
        rest: (G, R) positions to choose from, ascending.
        count: how many stay, from 1 to R.
        newline: (G, V) tokens that count as repetitions of anything.

    Returns:
        (G, count) positions, ascending.
    """
    while (left := rest.shape[1]) > count:
        first, second = rest[:, ::2], rest[:, 1::2]
        others = torch.full_like(newline, -torch.inf, dtype=like.dtype).scatter(1, second, 0.0)
        others = others.masked_fill(newline, -torch.inf)
        nearest = torch.full_like(rest, -torch.inf, dtype=like.dtype)  # the second half stays
        nearest[:, ::2] = (take_rows(like, first) + others[:, None]).amax(-1)
        nearest = nearest.masked_fill(newline.gather(1, rest), torch.inf)
        dropped = top(nearest, min(AT_ONCE, left // 2, left - count), 1.0)
        stays = torch.ones_like(rest, dtype=torch.bool).scatter(1, dropped, False)
        rest = rest.gather(1, marked(stays, left - dropped.shape[1]))
    return rest
