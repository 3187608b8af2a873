"""LLaVA-PruMerge and PruMerge+: keep what the class token singles out, and fold the rest into it.

Paper: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
Models", arXiv:2403.15388 (ICCV 2025). Reference code: 42Shawn/LLaVA-PruMerge @ 097c041; where paper
and code differ (layer, undivided heads, sums instead of averages, neighbours among all tokens), the
code is followed.
Differs from the reference: each image has a fence of its own (there: one over the batch, which
`as_released` brings back); an image without outliers keeps its most attended patch (there: none, or
an error); the spatial grid of PruMerge+ covers all patches (there: never the last one); fewer than
33 patches work; with a fixed ratio, patches of the grid that were chosen before are not taken twice
(there: they are). Like the release it merges what the projector is given, where that makes one
token of each row; where it mixes rows, which the release does not serve, tokens are merged after
it. An encoder whose last layer the language model sees is scored in that layer: our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Adaptive,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.budget import Share
from foveate.core.budget import count as budget_count
from foveate.core.fields import Natural, Range
from foveate.core.ranking import TIE, ranked, top
from foveate.core.transfer import members_of, upload
from foveate.errors import BudgetError
from foveate.io.quoting import quoted


@register(
    "llava-prumerge",
    stage="pre_llm",
    does="keeps [CLS] outliers, merges rest",
    needs=("joint_cls_attention", "encoder_keys"),
    paper="Shang et al. 2024, arXiv:2403.15388",
)
@dataclass(frozen=True)
class LLaVAPruMerge(Adaptive):
    """Keep patches whose class-token attention is an outlier, as many as there are.

    To each is added what its nearest neighbours hold, weighted by their attention; one token more
    holds all that was dropped, weighted alike.

    Args:
        plus: add a regular grid of patches (PruMerge+), as the release does.
        factor: an outlier lies this many interquartile ranges above the third quartile.
        ratio: share of the patches, rounded down, that counts as outliers instead; their grid is
            then as large (the release's `if_adaptive=False`).
        neighbours: how many patches are added to each survivor.
        keep: most tokens that survive, the additional one included; `None` for no limit. At least
            2 as a count.
        as_released: leave the last patch out of the grid, and let images that are reduced together
            have one fence, so that what an image keeps depends on the others.
        positions: `None` gives survivors consecutive positions (`renumbered`) in the order in which
            they were chosen, as the reference does, where positions are single numbers; `original`
            leaves them where they were. The additional token stands where the most attended of the
            dropped ones was.

    Cost: one query row of attention, and one product of the survivors' keys with all keys.
    """

    plus: bool = True
    factor: Annotated[float, Range(0)] = 1.5
    ratio: Annotated[float, Range(0, 1, above=True)] | None = None
    neighbours: Natural = 32
    keep: Share | None = None
    as_released: bool = False
    positions: Positions | None = None
    rounding = round

    def check_budget(self, steps: int | None) -> None:
        """`keep` is one limit, with room for a patch and the additional token.

        Raises:
            BudgetError: it is not.
        """
        one = type(self.keep) is int and self.keep == 1
        if one or isinstance(self.keep, tuple | PerRequest):
            raise BudgetError(
                "llava-prumerge takes a share, a count of at least 2 or None as keep, got "
                f"{quoted(self.keep)}"
            )
        super().check_budget(steps)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction around the projector, scored where the seen features are projected next."""
        layer = (min(model.feature_layer + 1, model.vision_layers - 1),)
        names = ("joint_cls_attention", "encoder_keys")
        needs = tuple(Need(name, layer) for name in names)
        return (Step("pre_llm", needs=needs, before_projector=True),)

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Keep outliers by falling attention, then the grid, then the additional token."""
        attention = tokens.signal("joint_cls_attention")[:, 0].float()
        order, chosen = self._choose(attention)
        if self.keep is not None:
            rounding = type(self).rounding
            limit = budget_count(self.keep, tokens.count, step=0, row=0, rounding=rounding)
            chosen = chosen.clamp(max=max(limit - 1, 1))
        keys = tokens.signal("encoder_keys")[:, 0].float().transpose(1, 2).flatten(2)
        given = order, F.normalize(keys, dim=-1), attention
        parts = []
        for count, members in by_count(chosen).items():
            first, unit, weights = (members_of(x, members) for x in given)
            parts.append((members, self._merge(first, unit, weights, count)))
        return parts

    def _choose(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(G, V) tokens with the chosen ones first, and (G) how many are chosen."""
        total = attention.shape[1]
        shared = self.as_released and self.ratio is None
        outliers, apart = self._shared(attention) if shared else self._own(attention)
        order = ranked(attention)
        rank = order.argsort(dim=1)
        if not self.plus:
            return order, outliers[:, 0]
        position = torch.arange(total, device=rank.device).expand_as(rank)
        stride: Tensor | int
        if self.ratio is None:  # a third of the mean distance between outliers, as released
            first, stride = 0, (apart // 3).clamp(min=1)
        else:
            first, stride = int(1 / self.ratio) // 2, int(1 / self.ratio)
        on_grid = (position >= first) & ((position - first) % stride == 0)
        on_grid &= position < total - self.as_released
        top = rank < outliers
        key = torch.where(on_grid, position + total, rank + 2 * total)
        return torch.where(top, rank, key).argsort(dim=1), (top | on_grid).sum(1)

    def _outliers(self, attention: Tensor) -> Tensor:
        """(G, 1) how many of (G, V) scores are outliers, at least one; -inf does not count."""
        patch = attention.isfinite()
        if self.ratio is not None:
            share = patch.sum(1, keepdim=True).double() * self.ratio
            return share.long().clamp(min=1)
        quarters = upload(torch.tensor([0.25, 0.75], dtype=attention.dtype), attention.device)
        low, high = attention.masked_fill(~patch, torch.nan).nanquantile(quarters, dim=1)
        fence = (high + self.factor * (high - low))[:, None]
        # Where all patches get alike, rounding must not make outliers of some.
        return (attention > fence + TIE * fence.abs()).sum(1, keepdim=True).clamp(min=1)

    def _own(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(G, 1) outliers of each image, and how far apart they lie on average, rounded down."""
        outliers = self._outliers(attention)
        return outliers, attention.isfinite().sum(1, keepdim=True) // outliers

    def _shared(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """The same for each image, by the outliers that all of them have together; with the
        rounding of the release, which multiplies by a share.
        """
        images, total = attention.shape
        share = self._outliers(attention.reshape(1, -1)).item() / (images * total)
        outliers = torch.full((images, 1), max(int(total * share), 1), device=attention.device)
        return outliers, torch.full_like(outliers, int(1 / share))

    def _merge(self, order: Tensor, keys: Tensor, attention: Tensor, count: int) -> Reduction:
        """Add neighbours to the first `count` tokens of an order, and the token for the dropped.

        Args:
            order: (G, V) chosen tokens, then the dropped ones by falling attention.
            keys: (G, V, C) keys of unit length.
            attention: (G, V) weights; -inf marks newlines between tiles, which are merged into
                nothing and get nothing.
            count: tokens chosen.
        """
        total = order.shape[1]
        kept = order[:, :count]
        rows = keys.gather(1, kept[..., None].expand(-1, -1, keys.shape[-1]))
        likeness = (rows @ keys.mT).scatter(2, kept[..., None], -torch.inf)
        nearest = top(likeness, min(self.neighbours, total - 1), 1.0)
        every = attention.clamp(min=0)[:, None].expand(-1, count, -1)
        every = every * (attention.gather(1, kept) >= 0)[..., None]
        weights = torch.zeros_like(likeness).scatter(2, nearest, every.gather(2, nearest))
        weights = weights.scatter(2, kept[..., None], 1.0)
        if count == total:
            return Reduction(kept, weights, ordered=True)
        dropped = attention.clamp(min=0).scatter(1, kept, 0.0)
        return Reduction(
            order[:, : count + 1], torch.cat((weights, dropped[:, None]), 1), ordered=True
        )
