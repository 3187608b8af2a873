"""FastVID: in segments of like frames, keep what is attended to and peaks that stand for the rest.

Paper: Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
arXiv:2503.11187 (NeurIPS 2025; identifier unverified). Reference code: LunarShen/FastVID @ a40a109,
its LLaVA-OneVision form.
Differs from the reference: frames are compared by the mean of their tokens (as its Qwen2.5-VL form
does; there: a pooling head that Hugging Face's checkpoints leave out) and salient tokens are those
that receive most attention in the encoder's last layer (there: that head's attention, or in the
Qwen2.5-VL form the attention of a frame's mean query); any batch works; density ties go to the
lower index (there: to noise of 1e-6); a video shorter than `segments` frames is cut into single
frames (there: an error); an anchor never gets more tokens than its frame has (there: an error).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Positions, Reduction, VisualTokens, register
from foveate.core.budget import Share
from foveate.core.fields import Positive, UnitFloat
from foveate.core.ranking import highest, ranked, top
from foveate.core.reduction import take_rows
from foveate.core.video import (
    Parts,
    VideoMethod,
    by_frame,
    everything,
    exact,
    normalize,
    together,
)
from foveate.ops.clustering import peaks, squared_distances
from foveate.ops.segments import segments_of

NEIGHBOURS = 4
"""Tokens that make up a density, a token itself among them; fixed in the release."""


@register(
    "fastvid",
    stage="pre_llm",
    does="video: segments and density peaks",
    needs=("received_attention",),
    paper="Shen et al. 2025, arXiv:2503.11187",
)
@dataclass(frozen=True)
class FastVID(VideoMethod):
    """Keep salient tokens of every frame, and merge the rest of a segment into density peaks.

    Every `p`-th frame of a segment, from its last, is an anchor. The tokens at its density peaks
    survive, and all tokens of the segment that are not salient go into the most similar one, at
    each anchor anew. An anchor that has no more peaks than a segment of one frame would merges its
    own frame alone, as in the release: with `p=1`, each frame does. Images pass untouched.

    Args:
        keep: share of each frame's tokens, or tokens of the whole video; 1.0 leaves a video as it
            is. Parts of a budget are rounded down, so that somewhat fewer may survive.
        segments: least number of segments (c).
        tau: cosine of neighbouring frames below which a segment ends.
        d: share of the budget that goes to density peaks.
        p: distance of the anchors of a segment, in frames.
        beta: least weight of a peak in what it becomes.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: all pairs of tokens in anchor frames, and tokens of a segment with its peaks; a dense
    map of K x V numbers.
    """

    keep: Share = 0.1
    segments: Positive = 8
    tau: float = 0.9
    d: UnitFloat = 0.4
    p: Positive = 4
    beta: UnitFloat = 0.6
    positions: Positions | None = None
    published_positions = "original"

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Reduce each video by itself, as their segments differ."""
        x = exact(by_frame(tokens.x, tokens))
        attention = by_frame(tokens.signal("received_attention")[:, 0], tokens)
        frames, cells = x.shape[1:3]
        share = self.keep
        budget = max(int(cells * share) if isinstance(share, float) else share // frames, 1)
        if budget >= cells:
            return everything(tokens)
        return together(
            [
                self.reduce_video(video, ranks, video.mean(1), budget)
                for video, ranks in zip(x, attention, strict=True)
            ]
        )

    def reduce_video(self, x: Tensor, attention: Tensor, frame: Tensor, budget: int) -> Reduction:
        """Reduce one video.

        Args:
            x: (T, P, D) tokens by frame.
            attention: (T, P) how salient each is.
            frame: (T, d) what stands for each frame when segments are cut.
            budget: tokens of a frame, R.
        """
        total, salient = attention.numel(), budget - int(budget * self.d)
        position = torch.arange(total, device=x.device).view_as(attention)
        order = ranked(attention)
        kept = position.gather(1, order[:, :salient]).flatten()
        rest = order[:, salient:].sort(-1).values
        x, position = take_rows(x, rest), position.gather(1, rest)  # (T, N, D) and (T, N)
        rank = peaks(squared_distances(x), NEIGHBOURS)
        index, weights = [kept], [_at(kept, x.new_ones(len(kept)), total)]
        for members, anchors, count in self._merges(frame, budget - salient):
            best = top(rank[anchors], min(count, x.shape[1]), 1.0)
            target = position[anchors].gather(1, best).flatten()
            own, shares = self._shares(take_rows(x[anchors], best), x[members].flatten(0, 1))
            rows = _at(target, own, total)
            rows[:, position[members].flatten()] += shares
            index.append(target)
            weights.append(rows)
        positions, ascending = torch.cat(index).sort()
        return Reduction(positions[None], torch.cat(weights)[ascending][None])

    def _merges(self, frame: Tensor, context: int) -> Iterator[tuple[slice, list[int], int]]:
        """Frames that are merged, their anchors, and how many peaks each of these has.

        Args:
            frame: (T, d) what stands for each frame.
            context: peaks that a frame would have if all were anchors.
        """
        for first, last in segments_of(frame, self.segments, self.tau):
            anchors = list(range(last, first - 1, -self.p))
            count = context * (last + 1 - first) // len(anchors)
            if not count:
                continue
            if count == context:  # as the release tells that a segment has one frame
                yield from ((slice(t, t + 1), [t], count) for t in anchors)
            else:
                yield slice(first, last + 1), anchors, count

    def _shares(self, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens count in the targets that they go into, one of each anchor.

        Args:
            target: (A, C, D) targets of A anchors.
            x: (M, D) tokens, the targets among them.

        Returns:
            (A * C) weight of each target itself, and (A * C, M) of the tokens that go into it; the
            target is one of them, and counts twice.
        """
        best = highest((normalize(target) @ normalize(x).T).mT, 1.0)[:, None]  # (A, 1, M)
        joined = best == torch.arange(target.shape[1], device=x.device)[:, None]
        count = joined.sum(-1, keepdim=True)
        own = (1 / (count + 1)).clamp(min=self.beta)
        shares = joined * ((1 - own) / count.clamp(min=1))
        return own.flatten().to(x), shares.flatten(0, 1).to(x)


def _at(index: Tensor, values: Tensor, total: int) -> Tensor:
    """(N, total) rows of zeros but for one value at (N) positions."""
    return values.new_zeros(len(index), total).scatter(1, index[:, None], values[:, None])
