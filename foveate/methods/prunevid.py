"""PruneVid: average what stands still in a scene, cluster the rest, then ask the question.

Paper: Huang et al., "PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
arXiv:2412.16117 (ACL 2025). Reference code: Visual-AI/PruneVid @ b12600c, whose licence is
non-commercial (CC BY-NC-SA): written from the equations, nothing is taken.
Differs from the reference: any batch works; a scene of one frame has no static tokens (there: a
division by zero decides); density ties go to the lower index (there: to noise of 1e-6); a video has
one scene at least (there: one of fewer than 1 / frame_ratio frames is an error); where positions
stay, an average of static tokens stands in the first frame of its scene (there: unspecified).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Positive, UnitFloat
from foveate.core.ranking import marked, ranked
from foveate.core.schedule import ranked_before
from foveate.core.transfer import members_of
from foveate.core.video import (
    Parts,
    Survivors,
    VideoMethod,
    by_frame,
    check_switch,
    everything,
    exact,
    together,
)
from foveate.ops.clustering import dpc_knn
from foveate.ops.segments import likeness_over_time, windows


@register(
    "prunevid",
    stage="pre_llm",
    does="video: merges what stands still",
    needs=("question_attention",),
    paper="Huang et al. 2025, arXiv:2412.16117",
)
@dataclass(frozen=True)
class PruneVid(VideoMethod):
    """Merge the tokens of a video scene by scene, then keep those that the question attends to.

    Before the language model, frames are clustered into scenes. Where a cell of the grid hardly
    changes over a scene its tokens are averaged, and both these static tokens and the dynamic ones
    of each frame are clustered and averaged. Inside, the static tokens of a scene and the dynamic
    ones of a frame are cut to a share each, in the caches of all layers. Images pass untouched.

    Args:
        tau: mean cosine over the frames of a scene above which a cell is static.
        frame_ratio: clusters of frames, as a share of the frames.
        cluster_ratio: what clustering leaves of static tokens, or of a frame's dynamic ones; at
            most 2k tokens stay as they are.
        alpha: share kept inside the language model, truncated; 1.0 does without that step.
        layer: decoder layer before which it happens; the attention is that of the layer before.
            `None` scales the release's choice, 11 of 32 layers, to layers that can rank tokens.
        k: neighbours that make up a density.
        keep: `None`, as what is alike decides; 1.0 removes nothing.
        positions: `None` gives merged tokens consecutive positions (`renumbered`), scene by scene,
            as the reference does, where positions are single numbers; `original` puts them where
            their cluster's center is. The later cut leaves positions as they are.

    Cost: cosines of a scene's frames, O(V·D), O(P²·D) for each frame, and the question's rows of
    attention in one layer.
    """

    tau: float = 0.8
    frame_ratio: UnitFloat = 0.25
    cluster_ratio: UnitFloat = 0.5
    alpha: UnitFloat = 0.4
    layer: Positive | None = None
    k: Positive = 7
    keep: float | None = None
    positions: Positions | None = None

    def check_budget(self, steps: int | None) -> None:
        """Check that no budget is given.

        Raises:
            BudgetError: `keep` is neither `None` nor 1.0.
        """
        check_switch(self.slug, self.keep)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """Merging, which needs nothing but the features, and the cut inside the language model."""
        merge = Step("pre_llm", whole=True, merges=True)
        if self.alpha == 1 or self.keep == 1.0:
            return (merge,)
        layer = self._published(model) if self.layer is None else self.layer
        attention = Need("question_attention", (layer - 1,))
        return (merge, Step("llm", layer, (attention,), effects=("keep_positions", "evict_cache")))

    def _published(self, model: ModelFacts) -> int:
        """The layer after the one that can rank tokens and is nearest to the release's."""
        wanted = model.text_layers * 11 / 32
        return ranked_before(
            wanted, model, self.slug, otherwise="use alpha=1.0, which does without"
        )

    def reduce_each(self, tokens: VisualTokens) -> Parts:
        """Merge before the language model, and cut inside."""
        if tokens.site == "pre_llm":
            return super().reduce_each(tokens)
        if tokens.label is None:  # an image
            return everything(tokens)
        scores = tokens.signal("question_attention").amax((1, 2, 3))
        kept = highest(scores, tokens.label, self.alpha)
        # A video of so few tokens that every share is truncated to none keeps one all the same.
        best = torch.zeros_like(kept).scatter(1, scores.argmax(1, keepdim=True), True)
        kept |= best & ~kept.any(1, keepdim=True)
        return [
            (tuple(members), Reduction(marked(members_of(kept, members), count)))
            for count, members in by_count(kept.sum(1)).items()
        ]

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Reduce each video by itself, as their scenes differ."""
        return together([self.reduce_video(video) for video in exact(by_frame(tokens.x, tokens))])

    def reduce_video(self, x: Tensor) -> Reduction:
        """Reduce one video of (T, P, D) tokens by frame."""
        total, frames = x[..., 0].numel(), len(x)
        scenes = max(int(frames * self.frame_ratio), 1)
        _, labels = dpc_knn(x.mean(1)[None], scenes, self.k)
        survivors = Survivors(total, x.device)
        position = torch.arange(total, device=x.device).view(x.shape[:2])
        start = 0
        for length in windows(labels[0].tolist()):
            window = slice(start, start + length)
            static = likeness_over_time(x[window]) > self.tau
            still = x[window][:, static]
            self._cluster(survivors, still.mean(0, keepdim=True), position[window][:, static])
            self._cluster(survivors, x[window][:, ~static], position[window][:, ~static])
            start += length
        return survivors.reduction()

    def _cluster(self, survivors: Survivors, x: Tensor, position: Tensor) -> None:
        """Merge (B, N, D) points within each of B groups.

        Args:
            survivors: where they go.
            x: the points.
            position: (W, N) tokens of W frames that make up the points: one frame for each group,
                or all of them for a single group.
        """
        groups, points = x.shape[:2]
        if not points:
            return
        center = torch.arange(points, device=x.device).expand(groups, -1)
        joined = center
        if points > 2 * self.k:
            center, joined = dpc_knn(x, max(int(points * self.cluster_ratio), 1), self.k)
        joined = joined + torch.arange(groups, device=x.device)[:, None] * center.shape[1]
        index = position[:groups].gather(1, center)
        survivors.average(
            index.flatten(), position.flatten(), joined.expand_as(position).flatten(), groups
        )


def highest(scores: Tensor, label: Tensor, share: float) -> Tensor:
    """Mark the highest scores of each set of tokens.

    Args:
        scores: (G, V).
        label: (G, V) the set that each token is in; those labelled -1 all stay.
        share: what is kept of a set, truncated.

    Returns:
        (G, V) bool.
    """
    order = ranked(scores)
    order = order.gather(1, label.gather(1, order).argsort(dim=-1, stable=True))
    sets = label.gather(1, order)  # ascending, the highest scores of a set first
    first = torch.searchsorted(sets, sets)
    size = torch.searchsorted(sets, sets, right=True) - first
    rank = torch.arange(sets.shape[1], device=sets.device) - first
    kept = (rank < (size.double() * share).long()) | (sets < 0)
    return torch.zeros_like(kept).scatter(1, order, kept)
