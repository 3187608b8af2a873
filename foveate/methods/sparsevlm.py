"""SparseVLM: let the words that the image speaks to rate its tokens, and recycle some of the rest.

Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", arXiv:2410.04417 (ICML 2025). Reference code: Gumpest/SparseVLMs @ 26a5f48: version 1 of
its main branch, version 2 (SparseVLM+) of its branch v2.0, the rank rule of its branch video.
Differs from the reference: any batch, several images, grouped-query attention and padding work;
only the rows of text are computed, not whole attention maps; clustering is without random noise, so
that equal densities go to the token that ranks higher; budgets are shares of an image's tokens,
which give the published counts at 576 (there: the same counts for all).
Unless `as_released`: where recycling would bring back all that was dropped, an image stays as it is
(there, every drop takes one token at least, and that token moves to the end); and what version 2
divides attention by, which far from the image comes near zero or below it, has a floor of `FLOOR`
times its largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from foveate.core import (
    Adaptive,
    Keep,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Scheduled,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Natural, Positive, UnitFloat
from foveate.core.ranking import TIE, ranked, top
from foveate.core.reduction import take_rows
from foveate.ops.clustering import dpc_knn

FLOOR = 0.05
PUBLISHED = {  # survivors of 576 tokens at each drop, by version and average over the layers
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@register(
    "sparsevlm",
    stage="llm",
    does="image-related words rate tokens",
    needs=("question_relevance", "question_attention"),
    paper="Zhang et al. 2024, arXiv:2410.04417",
)
@dataclass(frozen=True)
class SparseVLM(Scheduled, Adaptive):
    """Rank visual tokens by the attention of the text tokens that concern the image.

    Raters are the text tokens after the image to which its input embeddings attend more than to
    the average one; if none stands out, all rate.

    Args:
        layers: decoder layers before which tokens are dropped, ascending, from 1; the layer before
            each ranks. `None` scales the published (3, 7, 16) of 32 layers to the model at hand,
            or (2,) where `rank` is given.
        keep: what survives each drop, as a share of the ORIGINAL count of each image, or a count;
            recycled tokens come on top. One number is the mean over the layers from the first drop
            on. `None` is the published setting of 192 tokens on average, or no limit where `rank`
            is given; `PUBLISHED` has the others.
        version: 1 recycles dropped tokens and renumbers positions; 2 (SparseVLM+) corrects for
            rotary positions, listens to the heads that look at the image most, does not recycle
            and leaves positions.
        rank: lambda of the paper: drop this share of the tokens above the rank of the attention
            from raters to image, so that 1 keeps as many as the rank is (the release for videos);
            `keep` is a limit then. The paper's values for each layer are not known to us.
        tau: share of dropped tokens that is recycled, the best first.
        theta: clusters per recycled token. Each becomes one token, the mean of its members.
        heads: heads that version 2 listens to; `None` is the published 14 of 32.
        as_released: drop one token at least, whatever the budget, unless `rank` is given; in
            version 2, divide by the rotary product as it is, also where it is negative.
        positions: `None` is what the version does: 1 gives survivors consecutive positions
            (`renumbered`), kept tokens first and recycled ones after them; 2 leaves them
            (`original`).

    Cost: per drop, one key projection of all tokens and a query row for each text token after the
    image; version 1 adds distances of all recycled tokens to each other, `rank` a singular value
    decomposition.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep | None = None
    version: Literal[1, 2] = 1
    rank: UnitFloat | None = None
    tau: UnitFloat = 0.3
    theta: UnitFloat = 0.1
    heads: Positive | None = None
    as_released: bool = False
    positions: Positions | None = None
    published_layers = (3, 7, 16)
    ranked_before = 1
    rounding = round

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Published layers of a model of the published depth."""
        return self.published_layers if self.rank is None else (2,)

    @property
    def budget(self) -> Keep | None:
        """`keep`, or what is published."""
        if self.keep is not None or self.rank is not None:
            return self.keep
        return self.published_shares

    @property
    def published_shares(self) -> tuple[float, ...] | None:
        """What is published; where `rank` decides, `keep` is a limit and no mean."""
        if self.rank is not None:
            return None
        return tuple(count / 576 for count in PUBLISHED[self.version][192])

    def positions_on(self, model: ModelFacts) -> Positions:
        """As in `Method`; version 2 leaves positions unless told otherwise."""
        wanted = super().positions_on(model)
        return "original" if self.positions is None and self.version == 2 else wanted

    def needs_of(self, layer: int) -> tuple[Need, ...]:
        """What a drop before a layer needs."""
        needs = [Need("question_relevance"), Need("question_attention", (layer - 1,))]
        if self.version == 2:
            needs.append(Need("question_closeness", (layer - 1,)))
        return tuple(needs)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention from raters, averaged over heads and raters: (G, V)."""
        raters = _raters(tokens).sum(1, keepdim=True).clamp(min=1)
        return self.attention(tokens).sum(1) / raters

    def attention(self, tokens: VisualTokens) -> Tensor:
        """Attention of text to visual tokens, averaged over heads, zero where the text does not
        rate: (G, Q, V).
        """
        raters = _raters(tokens)[..., None]
        heads = tokens.signal("question_attention")[:, 0]
        if self.version == 1:
            return heads.mean(1) * raters
        return self._corrected(tokens, heads * raters[:, None])

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Keep the best rated tokens, and in version 1 recycle some of the others."""
        scores = self.scores(tokens)
        least = self.as_released and self.rank is None  # tokens to drop
        most = max(min(tokens.quota, tokens.count - least), 1)
        counts = torch.full(scores.shape[:1], most)
        if self.rank is not None:
            spare = tokens.count - torch.linalg.matrix_rank(self.attention(tokens))
            wanted = tokens.count - (self.rank * spare).long()
            counts = wanted.clamp(min=1, max=most)
        parts = []
        for count, members in by_count(counts).items():
            chosen = members if len(members) < len(scores) else slice(None)
            if self.version == 1:
                reduction = self._recycling(scores[chosen], count, tokens.x[chosen])
            else:
                reduction = Reduction.top(scores[chosen], count)
            parts.append((members, reduction))
        return parts

    def _corrected(self, tokens: VisualTokens, heads: Tensor) -> Tensor:
        """(G, Q, V) attention without what rotary positions alone give, mean over the heads that
        look at the image most.

        Args:
            tokens: with the signal `question_closeness`.
            heads: (G, H, Q, V) attention of raters; zero for other text.
        """
        close = tokens.signal("question_closeness")
        if not self.as_released:
            close = close.clamp(min=FLOOR)
        heads = torch.where(heads == 0, 0.0, heads / close)
        wanted = self.heads or max(1, round(heads.shape[1] * 14 / 32))
        looking = heads.sum((2, 3))
        best = top(looking, min(wanted, heads.shape[1]))
        share = torch.zeros_like(looking).scatter(1, best, 1 / best.shape[1])
        return torch.einsum("gh,ghqv->gqv", share, heads)

    def _recycling(self, scores: Tensor, count: int, x: Tensor) -> Reduction:
        """Keep `count` tokens by (G, V) scores, and recycle others by their (G, V, D) states."""
        total = scores.shape[1]
        order = ranked(scores)
        index = order[:, :count].sort(dim=-1).values
        taken = int(self.tau * (total - count)) + 1
        clusters = int(self.theta * taken) + 1
        if count + clusters >= total and not (self.as_released and count < total):
            return Reduction(torch.arange(total, device=scores.device).expand_as(scores))
        spent = order[:, count : count + taken]
        centers, joined = dpc_knn(take_rows(x, spent), clusters, clusters)
        slot = torch.full_like(order, -1).scatter(1, spent, joined + count)
        number = torch.arange(count, device=scores.device).expand_as(index)
        slot = slot.scatter(1, index, number)
        merged = Reduction.mean(torch.cat((index, spent.gather(1, centers)), 1), slot)
        return replace(merged, ordered=True)


def _raters(tokens: VisualTokens) -> Tensor:
    return rating(tokens.signal("question_relevance"), tokens.signal("question_mask"))


def rating(relevance: Tensor, mask: Tensor) -> Tensor:
    """Text tokens that concern the image more than the average one does.

    Args:
        relevance: (G, Q) how much the image's embeddings attend to each; anything for padding.
        mask: (G, Q) which are no padding.

    Returns:
        (G, Q) bool; all text where no token is above the average.
    """
    relevance = relevance.masked_fill(~mask, 0.0)
    mean = relevance.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    above = (relevance > mean * (1 + TIE)) & mask  # rounding makes nobody a rater
    return torch.where(above.any(1, keepdim=True), above, mask)
