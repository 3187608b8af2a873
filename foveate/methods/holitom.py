"""HoliTom: merge what stays the same over whole segments of a video, then thin out the rest.

Paper: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models",
arXiv:2505.21334 (NeurIPS 2025), the part outside the language model; the part inside is the method
`holitom-inner`, to be put after this one. Reference code: cokeshao/HoliTom @ e9b2972.
Differs from the reference: any batch and several videos work, each with the share it was asked for
(there a second video begins with what the first one's share became); density ties go to the lower
index (there: to noise of 1e-6); D above 0, which cannot run there, merges dynamic tokens by the
same clustering as static ones; a segment without dynamic tokens keeps one static token at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Positions, Reduction, VisualTokens, register
from foveate.core.fields import Positive, UnitFloat
from foveate.core.ranking import ranked
from foveate.core.reduction import take_rows
from foveate.core.video import (
    Parts,
    Survivors,
    VideoMethod,
    by_frame,
    check_one_share,
    everything,
    exact,
    similarity,
    together,
)
from foveate.ops.clustering import dpc_knn


@register(
    "holitom",
    stage="pre_llm",
    does="video: merges in time and space",
    needs=("received_attention",),
    paper="Shao et al. 2025, arXiv:2505.21334",
)
@dataclass(frozen=True)
class HoliTom(VideoMethod):
    """Cut a video into segments that repeat themselves most, merge over time, then in space.

    A cell of the grid is static in a segment if every frame there resembles the next. Static
    tokens become one over time, and are clustered; of the others, each frame keeps those that the
    encoder attends to most. Images pass untouched.

    Args:
        keep: share of the tokens of a video to aim at (the release's retain ratio); 1.0 leaves a
            video as it is. Segments are rounded one by one, so that counts differ a little.
        tau: cosine above which a token resembles the one of the next frame. The release pairs 0.65
            with keep=0.1, and 0.8 with 0.15 and more.
        beta: weight of a cluster's center in its average, in [0, 1].
        k: neighbours that make up a density.
        window: longest segment, in frames.
        d: share of the dynamic tokens that are clusters instead of the most attended; the release
            only runs with 0.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` puts merged tokens at their
            center's position in their segment's first frame.

    Cost: cosines of neighbouring frames, O(V·D), and O(P²·D) for each segment.
    """

    keep: float = 0.15
    tau: float = 0.8
    beta: UnitFloat = 0.6
    k: Positive = 7
    window: Positive = 1024
    d: UnitFloat = 0.0
    positions: Positions | None = None

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`, which is one share.

        Raises:
            BudgetError: it is something else.
        """
        super().check_budget(steps)
        check_one_share(self.keep)

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Reduce each video by itself, as their segments differ."""
        if self.keep == 1.0:
            return everything(tokens)
        x = exact(by_frame(tokens.x, tokens))
        attention = by_frame(tokens.signal("received_attention")[:, 0], tokens)
        return together([self.reduce_video(*video) for video in zip(x, attention, strict=True)])

    def reduce_video(self, x: Tensor, attention: Tensor) -> Reduction:
        """Reduce one video.

        Args:
            x: (T, P, D) tokens by frame.
            attention: (T, P) attention that each receives in the encoder.
        """
        total = x[..., 0].numel()
        runs = run_lengths(similarity(x[1:], x[:-1]) > self.tau)
        segments, saved = best_segments(runs, self.window)
        share = min(self.keep / ((total - saved) / total), 1)
        survivors = Survivors(total, x.device)
        position = torch.arange(total, device=x.device).view(x.shape[:2])
        for first, last in segments:
            static = (runs[last] >= last - first) & (last > first)
            frames, still, moving = slice(first, last + 1), static.sum().item(), ~static
            kept = math.ceil((len(static) - still) * share)
            if merged := max(round(still * share), int(not kept)):
                self._merge(survivors, x[frames][:, static], position[frames][:, static], merged)
            if kept:
                ranks = attention[frames][:, moving]
                self._thin(
                    survivors, x[frames][:, moving], position[frames][:, moving], ranks, kept
                )
        return survivors.reduction()

    def _merge(self, survivors: Survivors, x: Tensor, position: Tensor, count: int) -> None:
        """Merge the (W, N, D) static tokens of a segment over time, then in clusters."""
        frames = len(position)
        centers, joined, weight = self._clusters(x.mean(0, keepdim=True), count)
        joined, weight = joined.expand(frames, -1), weight.expand(frames, -1) / frames
        survivors.merge(
            position[0, centers[0]], position.flatten(), joined.flatten(), weight.flatten()
        )

    def _thin(
        self, survivors: Survivors, x: Tensor, position: Tensor, attention: Tensor, count: int
    ) -> None:
        """Keep of the (W, N, D) dynamic tokens of each frame the most attended, and clusters."""
        dominant = round(count * (1 - self.d))
        order = ranked(attention)
        kept = position.gather(1, order[:, :dominant].sort(-1).values)
        start = torch.arange(len(position), device=x.device)[:, None] * count
        own = start + torch.arange(dominant, device=x.device)
        index, members, joined, weight = kept, kept, own, torch.ones_like(kept, dtype=torch.float32)
        if dominant < count:
            rest = order[:, dominant:].sort(-1).values
            others = position.gather(1, rest)
            centers, slot, share = self._clusters(take_rows(x, rest), count - dominant)
            index = torch.cat((kept, others.gather(1, centers)), 1)
            members = torch.cat((kept, others), 1)
            joined = torch.cat((own, start + dominant + slot), 1)
            weight = torch.cat((weight, share), 1)
        survivors.merge(index.flatten(), members.flatten(), joined.flatten(), weight.flatten())

    def _clusters(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clusters of (B, N, D) points in the order of their centers.

        Returns:
            (B, C) centers, (B, N) the cluster of each point, and (B, N) its weight there: beta
            for the center, the rest in equal parts.
        """
        strongest, joined = dpc_knn(x, count, self.k)
        centers, order = strongest.sort(-1)
        joined = order.argsort(-1).gather(1, joined)
        members = torch.zeros_like(centers, dtype=torch.float32)
        members = members.scatter_add(1, joined, torch.ones_like(joined, dtype=torch.float32)) - 1
        weight = (1 - self.beta) / members.gather(1, joined)  # infinite for a center alone
        own = torch.where(members > 0, self.beta, 1.0)
        return centers, joined, weight.scatter(1, centers, own)


def run_lengths(same: Tensor) -> Tensor:
    """For how many frames, up to each, every cell has resembled the next frame.

    Args:
        same: (T - 1, P) whether a token resembles that of the next frame.

    Returns:
        (T, P) 0 where a token differs from that of the frame before.
    """
    frame = torch.arange(1, len(same) + 1, device=same.device)[:, None]
    broken = torch.where(same, 0, frame).cummax(0).values
    return torch.cat((torch.zeros_like(broken[:1]), frame - broken))


def best_segments(runs: Tensor, window: int) -> tuple[list[tuple[int, int]], int]:
    """Cut a video where most tokens can be merged over time.

    A segment saves its static cells times its length less one. Of cuts that save as much, the
    one with the shorter last segment wins.

    Args:
        runs: (T, P) of `run_lengths`.
        window: longest segment.

    Returns:
        (first, last) frame of each segment, and the tokens saved in all.
    """
    frames = len(runs)
    histogram = runs.new_zeros(frames, frames).scatter_add(1, runs, torch.ones_like(runs))
    static = histogram.flip(1).cumsum(1).flip(1).tolist()  # [t][n]: cells still for n frames
    saved, lengths = [0], []
    for last in range(frames):
        gains = [saved[last - n] + static[last][n] * n for n in range(min(last + 1, window))]
        lengths.append(max(range(len(gains)), key=gains.__getitem__) + 1)
        saved.append(max(gains))
    segments, last = [], frames - 1
    while last >= 0:
        segments.append((last - lengths[last] + 1, last))
        last -= lengths[last]
    return segments[::-1], saved[-1]
