"""FlashVID: keep what is attended to and diverse, and merge the rest along trees through frames.

Paper: Fan et al., "FlashVID: Efficient Video Large Language Models via Training-free Tree-based
Spatiotemporal Token Merging", arXiv:2602.08024 (ICLR 2026). Reference code: Fanziyang-v/FlashVID @
1d37422, with its selection `attn_div_v2`.
Differs from the reference: any batch works; a tree becomes the mean of its tokens (there: their sum
over one more than the tokens that merge into its root, which is no mean where a tree spans three
frames; `as_released=True` does so); in a segment of one frame, selected tokens are not clustered a
second time, and a token that was selected is never selected again (there it may be, and then counts
twice); density ties go to the lower index (there: to noise of 1e-6); a segment of which everything
else was selected has nothing to merge, and a share that leaves no room leaves a video whole (there:
errors); images pass untouched, inside the language model too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core import ModelFacts, Need, Positions, Reduction, Step, VisualTokens, register
from foveate.core.fields import Positive, Range, UnitFloat
from foveate.core.ranking import highest
from foveate.core.schedule import ranked_before
from foveate.core.video import (
    Parts,
    Survivors,
    VideoMethod,
    by_frame,
    check_one_share,
    everything,
    exact,
    normalize,
    together,
)
from foveate.ops.diversity import cosine_distance, select_diverse
from foveate.ops.segments import segments_of
from foveate.ops.trees import Trees


@register(
    "flashvid",
    stage="pre_llm",
    does="video: merges trees of frames",
    needs=("received_attention", "text_attention"),
    paper="Fan et al. 2026, arXiv:2602.08024",
)
@dataclass(frozen=True)
class FlashVID(VideoMethod):
    """Select tokens of each frame, merge others over time and in space, then cut inside the model.

    In each frame tokens are picked that are far from each other, by cosine distance times attention
    received and likeness to the frames of their segment. Of the others, those that are much like a
    token of the frame before merge into it, and what is left of a frame is clustered. Between
    decoder layers, tokens that the last prompt token attends to little are dropped.

    Args:
        keep: share of the tokens of a video that decoder layers see on average, as long as
            `expansion` fits the other fields. Parts of a budget are rounded up, so that counts
            differ a little; 1.0 leaves a video as it is.
        alpha: share of a frame's budget that is selected; the rest is merged.
        temporal_threshold: cosine above which a token merges into one of the frame before.
        segment_threshold: cosine of neighbouring frames below which a segment ends.
        min_segment_num: least number of segments.
        expansion: how many times `keep` enters the language model.
        pruning_layer: decoder layer before which its tokens are cut; the attention is that of the
            layer before. `None` scales the published 20 of 28 to layers that can rank tokens.
        llm_keep: what that cut leaves, rounded up (`llm_retention_ratio`); 1.0 does without.
        as_released: divide merged tokens as the release does.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were. The
            later cut leaves positions as they are.

    Cost: all pairs of tokens within a frame and of neighbouring frames, O(T·P²·D), and one row of
    attention in one decoder layer.
    """

    keep: float = 0.25
    alpha: UnitFloat = 0.7
    temporal_threshold: Annotated[float, Range(-1, 1)] = 0.8
    segment_threshold: float = 0.9
    min_segment_num: Positive = 8
    expansion: Annotated[float, Range(0)] = 1.25
    pruning_layer: Positive | None = None
    llm_keep: UnitFloat = 0.3
    as_released: bool = False
    positions: Positions | None = None

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`, which is one share.

        Raises:
            BudgetError: it is something else.
        """
        super().check_budget(1)
        check_one_share(self.keep)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """What a video is to leave, which rounding in each frame may change a little."""
        if self.keep == 1.0:
            return remaining
        wanted = remaining * self.llm_keep if number else total * self.keep * self.expansion
        return min(max(math.ceil(wanted), 1), remaining)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """Merging before the language model, and the cut inside it."""
        seen = Need("received_attention", (model.feature_layer,))
        merge = Step("pre_llm", needs=(seen,), whole=True, merges=True)
        if self.llm_keep == 1 or self.keep == 1.0:
            return (merge,)
        layer = self.pruning_layer
        if layer is None:
            without = "use llm_keep=1.0, which does without"
            layer = ranked_before(model.text_layers * 20 / 28, model, self.slug, otherwise=without)
        attention = Need("text_attention", (layer - 1,))
        return (merge, Step("llm", layer, (attention,), effects=("keep_positions",)))

    def reduce_each(self, tokens: VisualTokens) -> Parts:
        """Merge before the language model, and cut inside."""
        if tokens.site == "pre_llm":
            return super().reduce_each(tokens)
        if tokens.frames == 1:
            return everything(tokens)
        count = max(math.ceil(tokens.count * self.llm_keep), 1)
        scores = tokens.signal("text_attention")[:, 0].mean(1)
        return [(tuple(range(len(scores))), Reduction.top(scores, count))]

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Reduce each video by itself, as their segments differ."""
        x = exact(by_frame(tokens.x, tokens))
        attention = by_frame(tokens.signal("received_attention")[:, 0], tokens)
        budget = max(math.ceil(x.shape[2] * self.keep * self.expansion), 1)
        if budget >= x.shape[2]:
            return everything(tokens)
        pairs = zip(x, exact(attention), strict=True)
        return together([self.reduce_video(*video, budget) for video in pairs])

    def reduce_video(self, x: Tensor, attention: Tensor, budget: int) -> Reduction:
        """Reduce one video.

        Args:
            x: (T, P, D) tokens by frame.
            attention: (T, P) attention that each receives in the encoder.
            budget: tokens of a frame, less than P.
        """
        frame = x.mean(1)
        segments = segments_of(frame, self.min_segment_num, self.segment_threshold)
        number = math.ceil(budget * self.alpha)
        selected = torch.zeros_like(attention, dtype=torch.bool)
        if number:
            scene = torch.cat([frame[a : b + 1].mean(0).expand(b + 1 - a, -1) for a, b in segments])
            relevance = (x @ scene[..., None])[..., 0]
            selected.scatter_(1, select(x, attention * relevance, number), True)
        position = torch.arange(attention.numel(), device=x.device).view_as(attention)
        survivors = Survivors(attention.numel(), x.device)
        survivors.keep(position[selected])
        for first, last in segments:
            part = slice(first, last + 1)
            joins = self._joins(x[part], selected[part], budget)
            trees = Trees(x[part], joins, selected[part], self.as_released)
            trees.cluster_into(survivors, position[part], (budget - number) * len(joins))
        return survivors.reduction().in_raster_order()

    def _joins(self, x: Tensor, selected: Tensor, budget: int) -> Tensor:
        """(T, P) the token of the frame before that each of a segment merges into, or -1."""
        unit = normalize(x)
        like = unit[1:] @ unit[:-1].mT
        like = like.masked_fill(selected[1:, :, None] | selected[:-1, None], -1.0)
        nearest = highest(like, 1.0)
        alone = like.new_full((1, x.shape[1]), -1.0)
        best = torch.cat((alone, like.gather(2, nearest[..., None])[..., 0]))
        merges = best > self.temporal_threshold
        most = best.numel() - budget * len(x)
        if int(merges.sum()) > most:  # so many that the budget would not be met
            merges = best > max(float(best.flatten().topk(most).values[-1]), -1 + 1e-6)
        nearest = torch.cat((torch.full_like(alone, -1, dtype=torch.long), nearest))
        return torch.where(merges, nearest, -1)


def select(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """(T, K) diverse tokens of each frame.

    Args:
        x: (T, P, D) tokens.
        weight: (T, P) what distances to a token are multiplied by.
        count: tokens to pick, K.
    """
    largest = weight.abs().amax(1, keepdim=True)
    weight = weight / largest.masked_fill(largest == 0, 1)
    return select_diverse(cosine_distance(x).mul_(weight[:, None]), count)
