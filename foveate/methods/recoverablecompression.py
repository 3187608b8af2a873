"""Recoverable Compression: keep what the class token sees, recover what the text is about, merge
the rest into a few tokens.

Paper: Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by
Text Information", arXiv:2409.01179. Reference code: banjiuyufen/RecoverableCompression @ 5967da7,
read from a public fork.
Differs from the reference: any batch and several images work; at least one token of an image
survives; few tokens make few neighbours and small clusters, where the release fails; counts are
exact integers, where the release multiplies by rounded shares and can fall one short; clusters
compare their own keys, and there are as many centres as outliers among the remaining tokens, where
the release looks keys up at wrong positions and takes that share of the feature width
(`as_released=True` does all three).
Like the release it merges what the projector is given, where that makes one token of each row;
where it mixes rows, which the release does not serve, tokens are merged after it.
By default the text is the one after the image, in the language model's own embedding space: our
reading of how the method carries over to models without a text tower. `relevance="clip"` is the
release's, with CLIP's own rule for the text embedding, where the release reads the last position of
a padded text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Adaptive,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Positive
from foveate.core.ranking import ranked, top
from foveate.core.reduction import take_rows
from foveate.core.transfer import members_of
from foveate.ops.diversity import normalize
from foveate.ops.outliers import local_outliers
from foveate.ops.relevance import Relevance, relevance_needs, token_relevance


@register(
    "recoverable-compression",
    stage="pre_llm",
    does="recovers what the text needs",
    needs=("joint_cls_attention", "encoder_keys", "question_embeddings"),
    paper="Chen et al. 2024, arXiv:2409.01179",
)
@dataclass(frozen=True)
class RecoverableCompression(Adaptive):
    """Two filters whose sizes are numbers of outliers, and clusters of what neither keeps.

    Survivors are those of the filters in raster order, then the clusters by the attention of their
    centre, then one token for all that is left.

    Args:
        relevance: `embeddings` compares visual tokens with the text after their image, both as the
            language model is given them; `clip` compares patches with the question in CLIP's
            space, see `foveate.ClipText`.
        neighbours: neighbours of the outlier factor for the visual filter and for the text filter.
        centre_neighbours: the same for cluster centres.
        cluster_size: tokens added to each centre.
        text_weight: how much likeness to the text adds to that of keys when a cluster is formed.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.
        as_released: look keys up and count as the release does; see the module.

    Cost: one row of attention in the last encoder layer; three sorts of V numbers; K x V products.
    """

    relevance: Relevance = "embeddings"
    neighbours: Positive = 20
    centre_neighbours: Positive = 10
    cluster_size: Positive = 32
    text_weight: float = 50.0
    keep: None = None
    positions: Positions | None = None
    as_released: bool = False

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction around the projector, by signals of the last encoder layer."""
        last = (model.vision_layers - 1,)
        text = relevance_needs(self.relevance, Need("clip_plain_patches", last))
        needs = (Need("joint_cls_attention", last), Need("encoder_keys", last), *text)
        return (Step("pre_llm", needs=needs, before_projector=True),)

    def reduce_each(self, tokens: VisualTokens) -> list[tuple[list[int], Reduction]]:
        """Reduce each image to a number of tokens of its own."""
        seen = tokens.signal("joint_cls_attention")[:, 0].float()
        patch = seen > -torch.inf  # newlines are none
        seen, relevance = seen.masked_fill(~patch, 0.0), self.text_scores(tokens)
        keys = tokens.signal("encoder_keys")[:, 0].transpose(1, 2).flatten(2)
        main = self._filters(seen, relevance, patch)
        rest = patch & ~main
        if self.as_released:
            keys = take_rows(keys, (rest.long().cumsum(1) - 1).clamp(min=0))
        rank = _rank(seen.masked_fill(~rest, -torch.inf))
        centres = self._centres(seen, rest, keys.shape[-1])
        centre = rank < centres
        # The first of the rest lends its position to the token that stands for all of it.
        other = rest & (rank == centres) & (centres > 0)
        survivors = main | centre | other
        order = torch.where(main, 0, 1 + rank).masked_fill(~survivors, tokens.count + 1)
        order = order.argsort(dim=1, stable=True)
        parts = []
        for count, members in by_count(survivors.sum(1)).items():
            given = (seen, relevance, keys, rest, centre, other)
            first = members_of(order, members)[:, :count]
            parts.append((members, self._merged(first, *(members_of(x, members) for x in given))))
        return parts

    def text_scores(self, tokens: VisualTokens) -> Tensor:
        """(G, V) likeness of each token to the text, over the root of the width they share."""
        likeness, width = token_relevance(tokens, self.relevance, "clip_plain_patches")
        return likeness / math.sqrt(width)

    def _filters(self, seen: Tensor, relevance: Tensor, patch: Tensor) -> Tensor:
        """(G, V) tokens that the class token or the text keeps."""
        total = patch.sum(1)
        found = local_outliers(seen, self.neighbours, patch).sum(1)
        visual = self._share(total, found, total).clamp(min=1)
        kept = patch & (_rank(seen.masked_fill(~patch, -torch.inf)) < visual[:, None])
        lowest = relevance.masked_fill(~patch, torch.inf).amin(1, keepdim=True)
        relevance = torch.where(kept, lowest, relevance)
        found = local_outliers(relevance, self.neighbours, patch).sum(1)
        recovered = self._share(total - visual, found, total)
        open_ = patch & ~kept
        return kept | open_ & (
            _rank(relevance.masked_fill(~open_, -torch.inf)) < recovered[:, None]
        )

    def _centres(self, seen: Tensor, rest: Tensor, width: int) -> Tensor:
        """(G, 1) cluster centres among the remaining tokens."""
        outliers = local_outliers(seen, self.centre_neighbours, rest).sum(1, keepdim=True)
        if not self.as_released:
            return outliers
        remaining = rest.sum(1, keepdim=True)
        wanted = self._share(torch.full_like(remaining, width), outliers, remaining)
        return torch.minimum(wanted, remaining)

    def _share(self, count: Tensor, part: Tensor, whole: Tensor) -> Tensor:
        """As much of a count as a part is of a whole, rounded down."""
        whole = whole.clamp(min=1)
        if self.as_released:
            return (count.double() * (part.double() / whole)).long()
        return count * part // whole

    def _merged(
        self,
        index: Tensor,
        seen: Tensor,
        relevance: Tensor,
        keys: Tensor,
        rest: Tensor,
        centre: Tensor,
        other: Tensor,
    ) -> Reduction:
        """Survivors at (G, K) positions, of G images with equally many."""
        keys = normalize(keys)
        likeness = take_rows(keys, index) @ keys.mT + self.text_weight * relevance[:, None].to(keys)
        likeness = likeness.masked_fill(~rest[:, None], -torch.inf)
        likeness = likeness.scatter(2, index[..., None], -torch.inf)
        best = top(likeness, min(self.cluster_size, likeness.shape[-1]), 1.0)
        member = torch.zeros_like(likeness, dtype=torch.bool).scatter(2, best, True)
        member &= likeness > -torch.inf
        of_centre = member & centre.gather(1, index)[..., None]
        of_other = (rest & ~centre)[:, None] & other.gather(1, index)[..., None]
        weights = (of_centre | of_other) * seen[:, None]
        itself = (~other).gather(1, index)[..., None].to(weights)
        return Reduction(index, weights.scatter_add(2, index[..., None], itself), ordered=True)


def _rank(scores: Tensor) -> Tensor:
    """(G, V) rank of each token among (G, V) scores, 0 for the highest."""
    order = ranked(scores)
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, rank)
