"""A small network that finds the box a sentence speaks of, around the loop of TSP3D.

Paper and reference code as in `pruning.py`. Differs from the reference: the backbone is not its
residual network of 34 layers but one block for each level, and sentences come as features, from
whatever encodes them (there, RoBERTa).

Shapes: `n` voxels of all scenes together, `B` scenes, `T` words, `C` channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.voxels.convolution import NormReLU, SparseConv, block
from foveate.voxels.loop import Refined, TwoLevelPruning
from foveate.voxels.sparse import SparseVoxels


@dataclass(frozen=True)
class Grounding:
    """Boxes of every voxel of the finest level.

    Args:
        boxes: (n, 6) centre and size along x, y and z, in metres.
        logits: (n) how sure a voxel is that its box is the target's.
        refined: what they were made of.
    """

    boxes: Tensor
    logits: Tensor
    refined: Refined

    def best(self) -> tuple[Tensor, Tensor]:
        """(B, 6) the box of each scene's surest voxel, and (B) its probability."""
        scenes, count = self.refined.voxels.scenes, len(self.refined.voxels.counts)
        rows = [
            int(self.logits.masked_fill(scenes != b, -torch.inf).argmax()) for b in range(count)
        ]
        return self.boxes[rows], self.logits[rows].sigmoid()


class Backbone(nn.Module):
    """Levels of a scene: a block at full resolution, then two blocks at each halving.

    Args:
        inputs: channels of the scene, such as 3 for colours.
        channels: of every level.
        halvings: how often the resolution is halved, 2 at least; the last three are the levels.

    Raises:
        InputError: there are fewer than two halvings.
    """

    def __init__(self, inputs: int, channels: int, halvings: int = 3) -> None:
        super().__init__()
        if halvings < 2:
            raise InputError(f"three levels need two halvings at least, got {halvings}")
        self.stem = block(inputs, channels)
        self.down = nn.ModuleList([
            nn.Sequential(block(channels, channels, 3, 2), block(channels, channels))
            for _ in range(halvings)
        ])  # fmt: skip

    def forward(self, voxels: SparseVoxels) -> list[SparseVoxels]:
        """Three levels of (n, C) features, the finest first."""
        levels = [self.stem(voxels)]
        for down in self.down:
            levels.append(down(levels[-1]))
        return levels[-3:]


class BoxHead(nn.Module):
    """A box and a score for each voxel, from its features and the first word's.

    Args:
        channels: of voxels and words.
        voxel_size: side of the finest voxel, in metres.
    """

    def __init__(self, channels: int, voxel_size: float = 0.01) -> None:
        super().__init__()
        self.voxel_size = voxel_size
        self.fuse = nn.Sequential(SparseConv(2 * channels, channels, 1), NormReLU(channels))
        self.box, self.score = nn.Linear(channels, 6), nn.Linear(channels, 1)
        for layer in (self.box, self.score):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(self.score.bias, -math.log(99))  # a probability of 1 % to begin with

    def forward(self, refined: Refined) -> Grounding:
        """The box and the score of each voxel of the finest level."""
        voxels = refined.voxels
        first = refined.words[voxels.scenes, 0]
        fused = self.fuse(voxels.with_features(torch.cat((voxels.features, first), 1)))
        shift, size = self.box(fused.features).split(3, 1)
        centre = voxels.coordinates[:, 1:].to(shift) * self.voxel_size + shift
        logits = self.score(fused.features)[:, 0]
        return Grounding(torch.cat((centre, size.exp()), 1), logits, refined)


class VoxelGrounder(nn.Module):
    """Backbone, loop and head.

    Args:
        backbone: three levels of a scene, with the channels of the loop.
        loop: prunes and upsamples.
        head: reads boxes.
    """

    def __init__(self, backbone: nn.Module, loop: TwoLevelPruning, head: BoxHead) -> None:
        super().__init__()
        self.backbone, self.loop, self.head = backbone, loop, head

    def forward(
        self,
        voxels: SparseVoxels,
        words: Tensor,
        mask: Tensor,
        *,
        prune: bool = True,
        generator: torch.Generator | None = None,
    ) -> Grounding:
        """Find the boxes that sentences speak of.

        Args:
            voxels: scenes at stride 1.
            words: (B, T, C) features of the sentences.
            mask: (B, T) which of them are words and not padding.
            prune: whether voxels are pruned and added.
            generator: draws samples.

        Raises:
            InputError: scenes, words and channels do not fit together.
        """
        levels = self.backbone(voxels)
        return self.head(self.loop(levels, words, mask, prune=prune, generator=generator))
