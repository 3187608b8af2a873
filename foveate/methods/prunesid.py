"""PruneSID: group tokens by principal components, and keep of each group what repeats least.

Paper: Fang et al., "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via
Synergistic Importance-Diversity", arXiv:2603.09480 (ICLR 2026). Reference code:
ZhengyaoFang/PruneSID @ 4ef17d9, its LLaVA form.
Differs from the reference: components are exact, by an eigendecomposition (there: a randomised one,
so that the same image may keep other tokens the next time); what is sent on are visual tokens of
the model, so that the class token's own feature, which the release keeps and counts, is not, and
one more patch takes its place; survivors stay in raster order (there: group by group, but sorted
for LLaVA-NeXT); tiles of an image share one budget; without a class token, attention received
counts; ties go to the lower index, of tokens and groups; newlines between tiles come last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from foveate.core.ranking import TIE, highest, marked, ranked
from foveate.ops.diversity import normalize
from foveate.ops.saliency import saliency, saliency_need


@register(
    "prunesid",
    stage="pre_llm",
    does="groups by principal components",
    needs=("cls_attention", "received_attention", "encoder_features"),
    paper="Fang et al. 2026, arXiv:2603.09480",
)
@dataclass(frozen=True)
class PruneSID(Method):
    """Group tokens, suppress within a group what is like a more salient token, and share budgets.

    A token's group is the principal component of the encoder's features that it weighs most in, of
    a quarter as many as tokens are kept. A group's share of the budget is that of the tokens that
    are not suppressed in it; they come first, by attention. Attention is the class token's in the
    layer that is read; without a class token, attention received there.

    Args:
        keep: what survives; a count is the release's `need_token_num`. Shares are rounded half to
            even.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one V x V product of the encoder's features, and an eigendecomposition of V x V or C x C
    numbers, whichever is less.
    """

    keep: Keep = 192
    positions: Positions | None = None
    rounding = round

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, scored in the layer that the language model sees."""
        features = Need("encoder_features", (model.feature_layer,))
        return (Step("pre_llm", needs=(saliency_need(model), features)),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` tokens of all groups, in raster order."""
        x = tokens.signal("encoder_features")[:, 0]
        kept = select(x, saliency(tokens), count, count)
        return Reduction(marked(kept, count))


def select(x: Tensor, seen: Tensor, budget: int, count: int) -> Tensor:
    """Choose tokens.

    Args:
        x: (G, V, C) features.
        seen: (G, V) saliency; minus infinity for what is no patch.
        budget: what the number of groups, the threshold and the bounds of a group follow from.
        count: how many are chosen.

    Returns:
        (G, V) bool.
    """
    groups = max(budget // 4, 1)
    group = component(x, groups)
    unit = normalize(x)
    like = unit @ unit.mT
    total = like.shape[-1]
    pairs = (like.sum((1, 2)) - like.diagonal(dim1=1, dim2=2).sum(1)) / max(total * (total - 1), 1)
    rank = ranked(seen).argsort(dim=-1)
    fresh = not_repeated(like, group, rank, ~seen.isneginf(), budget / 32 * pairs)
    size, survivors = (
        torch.zeros(len(x), groups, dtype=torch.long, device=x.device).scatter_add(1, group, one)
        for one in (torch.ones_like(group), fresh.long())
    )
    quota = quotas(size, survivors, budget, count)
    order = (rank - total * fresh + 2 * total * group).argsort(dim=-1)  # by group, the best first
    group = group.gather(1, order)
    place = torch.arange(total, device=x.device) - (size.cumsum(1) - size).gather(1, group)
    chosen = place < quota.gather(1, group)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def component(x: Tensor, count: int) -> Tensor:
    """(G, V) the principal component in which each token weighs most, by absolute value.

    Tokens are the variables, and the sigmoids of their C features the samples.

    Args:
        x: (G, V, C) features.
        count: how many of the first components there are to choose from.
    """
    y = x.detach().double().sigmoid()
    y = y - y.mean(-1, keepdim=True)
    tokens, width = y.shape[1:]
    power, vectors = torch.linalg.eigh(y @ y.mT if tokens <= width else y.mT @ y)
    power, vectors = power.flip(-1)[:, :count], vectors.flip(-1)[..., :count]
    if tokens > width:
        vectors = y @ vectors / power.clamp(min=1e-300).sqrt()[:, None]
    # Components without variance are what rounding makes them.
    power = torch.where(power > TIE * power[:, :1], 1.0, 0.0)
    return highest((vectors * power[:, None]).abs(), 1.0)


def not_repeated(
    like: Tensor, group: Tensor, rank: Tensor, candidates: Tensor, threshold: Tensor
) -> Tensor:
    """Suppress, in each group, tokens that are like one that ranks above them.

    Args:
        like: (G, V, V) cosines.
        group: (G, V) group of each token.
        rank: (G, V) place of each token by saliency, 0 for the first.
        candidates: (G, V) tokens that can be chosen.
        threshold: (G) cosine above which a token is suppressed.

    Returns:
        (G, V) tokens that are not suppressed.
    """
    total, near = like.shape[-1], threshold[:, None] + TIE
    order, fresh = rank.argsort(dim=-1), torch.zeros_like(candidates)
    while bool(candidates.any()):  # a token of each group in turn
        first = torch.full_like(group, total).scatter_reduce(
            1, group, rank.masked_fill(~candidates, total), "amin"
        )
        best = first.gather(1, group)  # rank of the best of the token's group
        chosen = candidates & (rank == best)
        fresh = fresh | chosen
        leader = order.gather(1, best.clamp(max=total - 1))
        to_leader = like.gather(1, leader[:, None])[:, 0]
        candidates = candidates & ~chosen & (to_leader <= near)
    return fresh


def quotas(size: Tensor, survivors: Tensor, budget: int, count: int) -> Tensor:
    """Tokens that each group keeps.

    One at least, and the rest in proportion to what is not suppressed, within bounds; what bounds
    leave over goes to the groups where least is suppressed.

    Args:
        size: (G, Q) tokens of each group.
        survivors: (G, Q) those that are not suppressed.
        budget: the bound of a group is five for every 64 of it, begun ones included.
        count: the sum of all.

    Returns:
        (G, Q).
    """
    most = size.minimum(survivors).clamp(max=5 * math.ceil(budget / 64))
    while bool((short := most.sum(1, keepdim=True) < budget).any()):
        most = (most + short.long()).minimum(size)
    least = size.clamp(max=1)
    rest = count - least.sum(1, keepdim=True)
    parts = (survivors.cumsum(1) * rest).double() / survivors.sum(1, keepdim=True).clamp(min=1)
    quota = (least + parts.round().long().diff(dim=1, prepend=torch.zeros_like(rest))).minimum(most)
    order = survivors.argsort(dim=1, descending=True, stable=True)
    room = (most - quota).gather(1, order)
    left = count - quota.sum(1, keepdim=True)
    more = (left - (room.cumsum(1) - room)).clamp(min=0).minimum(room)
    return quota.scatter_add(1, order, more)
