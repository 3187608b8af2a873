"""What TSP3D does between two levels: prune voxels by the sentence, and add missing ones back.

Paper: Guo et al., "Text-guided Sparse Voxel Pruning for Efficient 3D Visual Grounding",
arXiv:2502.10392 (CVPR 2025), sections on text-guided pruning and completion-based addition.
Reference code: GWxuan/TSP3D @ 3bd5e90, `models/multilevel_head.py`.
Differs from the reference: a logit is that of keeping a voxel (theirs is of removing it); the best
voxel of a scene always survives (where no voxel does, theirs stops in a debugger); of an added
voxel, the features of voxels generated around it are averaged. Theirs interpolates between the
corners of a cell, at corners that are absent by construction, and so always adds 0; that form is
`as_released=True`. How the paper interpolates is not known from code, so the mean is our reading.

Shapes: `n` voxels of all scenes together, `B` scenes, `T` words, `C` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.errors import BudgetError
from foveate.io.quoting import quoted
from foveate.voxels.convolution import interpolate, neighbour_mean
from foveate.voxels.fusion import TextFusion
from foveate.voxels.sparse import SparseVoxels


class TextGuidedPruning(nn.Module):
    """Decides by the sentence which voxels go on to the next level.

    Args:
        fusion: the attention between voxels and words.
        channels: of both.
        threshold: voxels whose probability is above it are kept, from 0 (all) to below 1; the
            release has 0.7 at the coarsest level (where objects are) and 0.3 below (the target).

    Raises:
        BudgetError: the threshold is out of range.
    """

    def __init__(self, fusion: TextFusion, channels: int, threshold: float) -> None:
        super().__init__()
        self.fusion, self.threshold = fusion, _share("threshold", threshold)
        self.score = nn.Linear(channels, 1)
        nn.init.normal_(self.score.weight, std=0.01)

    def forward(
        self, voxels: SparseVoxels, words: Tensor, mask: Tensor
    ) -> tuple[SparseVoxels, Tensor, Tensor]:
        """Fuse voxels (n, C) with words (B, T, C) of which `mask` (B, T) are real.

        Returns:
            The voxels and the words with new features, and (n) logits of keeping each voxel.
        """
        voxels, words = self.fusion(voxels, words, mask)
        return voxels, words, self.score(voxels.features)[:, 0]

    def keep(self, voxels: SparseVoxels, logits: Tensor) -> Tensor:
        """(n) which voxels survive: those above the threshold, and the best of each scene."""
        return (logits.sigmoid() > self.threshold) | best(voxels, logits, 1)

    @staticmethod
    def keep_generated(
        generated: SparseVoxels, voxels: SparseVoxels, logits: Tensor, most: int
    ) -> Tensor:
        """(m) which generated voxels survive in training: `most` of each scene at most, those
        whose logits, interpolated between the (n) voxels that were scored, are highest.
        """
        scored = voxels.with_features(logits.detach()[:, None])
        return best(generated, interpolate(scored, generated)[:, 0], most)


class CompletionAddition(nn.Module):
    """Adds voxels back that pruning removed, where the backbone's own show the target.

    Args:
        fusion: the attention between the backbone's voxels and the words.
        channels: of both.
        threshold: voxels whose probability is above it are added, from 0 to below 1.
        samples: of a scene that has more voxels, so many are drawn at random; `None` looks at all.
        as_released: added voxels get nothing from the voxels generated around them.

    Raises:
        BudgetError: a number is out of range.
    """

    def __init__(
        self,
        fusion: TextFusion,
        channels: int,
        threshold: float = 0.15,
        samples: int | None = 2400,
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if samples is not None and samples < 1:
            raise BudgetError(f"samples must be a positive count or None, got {samples}")
        self.fusion, self.threshold = fusion, _share("threshold", threshold)
        self.samples, self.as_released = samples, as_released
        self.score = nn.Linear(channels, 1)

    def forward(
        self,
        backbone: SparseVoxels,
        generated: SparseVoxels,
        fused: SparseVoxels,
        words: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[SparseVoxels, Tensor, SparseVoxels, Tensor]:
        """Add missing voxels.

        Args:
            backbone: voxels of this level as the backbone made them, (N, C).
            generated: voxels that upsampling has made from the survivors, (n, C).
            fused: the same voxels, to which the backbone's features were added.
            words: (B, T, C).
            mask: (B, T) which of the words are real.
            generator: draws the sample.

        Returns:
            The voxels of `fused` and the added ones; the words with new features; and what the
            decision was about: the voxels that were looked at, and their logits.
        """
        looked = sample(backbone, self.samples, generator)
        looked, words = self.fusion(looked, words, mask)
        logits = self.score(looked.features)[:, 0]
        there, _ = fused.find(looked.keys)
        missing = looked.take((logits.sigmoid() > self.threshold) & ~there)
        features = missing.features
        if not self.as_released:
            features = features + neighbour_mean(generated, missing)
        keys, order = torch.cat((fused.keys, missing.keys)).sort()
        joined = torch.cat((fused.features, features))[order]
        joint = SparseVoxels._of(keys, joined, fused.stride, len(fused.counts))
        return joint, words, looked, logits


def best(voxels: SparseVoxels, scores: Tensor, count: int) -> Tensor:
    """(n) which voxels are the `count` best of their scene; ties go to the first.

    Args:
        voxels: of B scenes.
        scores: (n), higher is better.
        count: how many of each scene, all if it has fewer.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[voxels.scenes[order].argsort(stable=True)]
    place = torch.arange(len(voxels), device=order.device)
    place = place - (voxels.counts.cumsum(0) - voxels.counts)[voxels.scenes]
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, place < count)


def sample(
    voxels: SparseVoxels, most: int | None, generator: torch.Generator | None = None
) -> SparseVoxels:
    """`most` voxels of each scene, drawn at random; scenes that have fewer stay whole."""
    if most is None or int(voxels.counts.max()) <= most:
        return voxels
    scores = torch.rand(len(voxels), generator=generator, device=voxels.keys.device)
    return voxels.take(best(voxels, scores, most))


def _share(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise BudgetError(f"{name} must be a probability in [0, 1), got {quoted(value)}")
    return float(value)
