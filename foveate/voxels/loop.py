"""The loop of TSP3D: from the coarsest of three levels to the finest, pruning on the way.

Paper and reference code as in `pruning.py`; defaults are those of `TSPHead`.
Differs from the reference: scenes are never padded to a fixed count in training.

Shapes: `n` voxels of all scenes together, `B` scenes, `T` words, `C` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from foveate.errors import BudgetError, InputError
from foveate.voxels.convolution import block, up_block
from foveate.voxels.fusion import TextFusion
from foveate.voxels.pruning import CompletionAddition, TextGuidedPruning, sample
from foveate.voxels.sparse import SparseVoxels

Decision = tuple[SparseVoxels, Tensor]
"""Voxels (n, C) that were looked at, and a logit (n) for each."""


@dataclass(frozen=True)
class LevelCount:
    """How many voxels of all scenes a step from one level to the next handled.

    Args:
        stride: of the finer level.
        scored: voxels of the coarser level.
        kept: those of them that were upsampled; in training all, as pruning follows later.
        generated: voxels that upsampling made of them.
        added: voxels that were added back.
        left: voxels of the finer level in the end.
    """

    stride: int
    scored: int
    kept: int
    generated: int
    added: int
    left: int


@dataclass(frozen=True)
class Refined:
    """The finest level, and how it came to be.

    Args:
        voxels: (n, C) voxels of the finest level.
        words: (B, T, C) words after all fusions.
        decisions: what pruning was decided on, the coarsest level first.
        completion: what addition was decided on; `None` without pruning.
        counts: of both steps, the coarser first.
    """

    voxels: SparseVoxels
    words: Tensor
    decisions: tuple[Decision, ...]
    completion: Decision | None
    counts: tuple[LevelCount, ...]


class TwoLevelPruning(nn.Module):
    """Upsample twice; prune before each time by the sentence, and add voxels back at the end.

    In training, pruning follows upsampling and keeps a count of voxels of each scene, so that a
    poor decision early on leaves enough to learn from.

    Args:
        channels: of all three levels and the words.
        thresholds: probability of keeping above which a voxel goes on to level 0 and to level 1.
        addition: probability above which a voxel of the backbone is added at level 0.
        samples: voxels of a scene that addition looks at, at most.
        train_samples: in training, voxels of a scene that are looked at in levels 1 and 2, at most.
        train_keep: in training, how many generated voxels of a scene survive in levels 0 and 1, at
            most; a range to draw from.
        layers: rounds of attention before each decision.
        heads: of the attention.
        hidden: width of its networks for each token.
        dropout: in training.
        voxel_size: side of the finest voxel, in metres.
        as_released: addition as in the release; see `CompletionAddition`.

    Raises:
        BudgetError: a threshold or a count is out of range.
        InputError: channels are no multiple of the heads.
    """

    def __init__(
        self,
        channels: int = 128,
        *,
        thresholds: tuple[float, float] = (0.3, 0.7),
        addition: float = 0.15,
        samples: int | None = 2400,
        train_samples: tuple[int, int] = (3200, 320),
        train_keep: tuple[tuple[int, int], tuple[int, int]] = ((1200, 4000), (4000, 4000)),
        layers: int = 2,
        heads: int = 8,
        hidden: int = 128,
        dropout: float = 0.1,
        voxel_size: float = 0.01,
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if len(thresholds) != 2:
            raise BudgetError(f"thresholds must be two, of levels 0 and 1, got {thresholds}")
        for low, high in train_keep:
            if not 1 <= low <= high:
                raise BudgetError(f"train_keep must be ranges of positive counts, got {train_keep}")
        self.train_samples, self.train_keep = train_samples, train_keep

        def fusion() -> TextFusion:
            return TextFusion(channels, layers, heads, hidden, dropout, voxel_size)

        self.pruning = nn.ModuleList(
            [TextGuidedPruning(fusion(), channels, threshold) for threshold in thresholds]
        )
        self.addition = CompletionAddition(fusion(), channels, addition, samples, as_released)
        self.up = nn.ModuleList([up_block(channels, channels) for _ in range(2)])
        self.lateral = nn.ModuleList([block(channels, channels) for _ in range(3)])
        self.out = block(channels, channels)

    def forward(
        self,
        levels: Sequence[SparseVoxels],
        words: Tensor,
        mask: Tensor,
        *,
        prune: bool = True,
        generator: torch.Generator | None = None,
    ) -> Refined:
        """Refine a backbone's levels.

        Args:
            levels: three levels of the backbone, the finest first, each of twice the stride of the
                one before; (n, C) features.
            words: (B, T, C) features of the sentences.
            mask: (B, T) which of them are words and not padding.
            prune: whether voxels are pruned and added; if not, all of them go on.
            generator: draws samples.

        Raises:
            InputError: levels or words do not fit together.
        """
        _check(levels)
        decisions: list[Decision] = []
        counts, completion = [], None
        x, words = self._decide(1, levels[2], words, mask, decisions, prune, generator)
        for level in (1, 0):
            scored, (kept, generated, new) = len(x), self._step(level, x, decisions, prune)
            x = new.with_features(new.features + levels[level].at(new))
            before = len(x)
            if level:
                x, words = self._decide(0, x, words, mask, decisions, prune, generator)
            elif prune:
                x, words, *looked = self.addition(levels[0], new, x, words, mask, generator)
                completion = (looked[0], looked[1])
            added = 0 if level else len(x) - before
            counts.append(LevelCount(x.stride, scored, kept, generated, added, len(x)))
        x = self.out(self.lateral[0](x))
        return Refined(x, words, tuple(decisions), completion, tuple(counts))

    def _decide(
        self,
        number: int,
        x: SparseVoxels,
        words: Tensor,
        mask: Tensor,
        decisions: list[Decision],
        prune: bool,
        generator: torch.Generator | None,
    ) -> tuple[SparseVoxels, Tensor]:
        """Fuse a level with the words, note its logits, and convolve it."""
        if self.training and prune:
            x = sample(x, self.train_samples[number], generator)
        x, words, logits = self.pruning[number](x, words, mask)
        decisions.append((x, logits))
        return self.lateral[number + 1](x), words

    def _step(
        self, level: int, x: SparseVoxels, decisions: list[Decision], prune: bool
    ) -> tuple[int, int, SparseVoxels]:
        """How many were upsampled, how many that made, and the voxels of the new level."""
        looked, logits = decisions[-1]
        pruning = cast(TextGuidedPruning, self.pruning[level])
        if prune and not self.training:
            x = x.take(pruning.keep(looked, logits))
        new = self.up[level](x)
        kept, generated = len(x), len(new)
        if prune and self.training:
            low, high = self.train_keep[level]
            most = int(torch.randint(low, high + 1, ()))
            new = new.take(pruning.keep_generated(new, looked, logits, most))
        return kept, generated, new


def _check(levels: Sequence[SparseVoxels]) -> None:
    strides = [level.stride for level in levels]
    if len(strides) != 3 or strides[1] != 2 * strides[0] or strides[2] != 4 * strides[0]:
        raise InputError(
            f"levels must be three, each of twice the stride of the one before; got {strides}"
        )
    if len({len(level.counts) for level in levels}) > 1:
        raise InputError("levels are not of the same scenes")
