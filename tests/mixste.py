"""MixSTE, which lifts poses from two dimensions to three: blocks along joints and along frames.

Zhang et al., "MixSTE: Seq2seq Mixed Spatio-Temporal Encoder for 3D Human Pose Estimation in Video",
arXiv:2203.00859, in the form of NationalGAILab/HoT @ 873b5bd. Nothing here but the method that is
handed to it uses foveate. Shapes: `B` videos, `F` frames, `J` joints, `C` width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sizes(NamedTuple):
    width: int = 512
    frames: int = 243
    joints: int = 17
    depth: int = 8
    heads: int = 8


class Block(nn.Module):
    """A pre-norm block; the MLP is twice as wide as the states."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.projected, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) of N sequences."""
        parts = self.projected(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.output((weights @ value).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class MixSTE(nn.Module):
    """Each layer is a block along the joints of a frame, and one along the frames of a joint.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.embed = nn.Linear(2, width)
        self.of_joint = nn.Parameter(torch.zeros(sizes.joints, width))
        self.of_frame = nn.Parameter(torch.zeros(sizes.frames, width))
        self.spatial, self.temporal = (
            nn.ModuleList(Block(width, sizes.heads) for _ in range(sizes.depth)) for _ in range(2)
        )
        self.spatial_norm, self.temporal_norm = (nn.LayerNorm(width, 1e-6) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def forward(self, poses: Tensor, method=None, shown: Callable | None = None) -> Tensor:
        """(B, F, J, 3) poses of (B, F, J, 2); without a way back, of the frames that are kept.

        Args:
            poses: in two dimensions.
            method: what keeps some of the frames before one of the layers.
            shown: makes tokens for it of (B, F, J, C) states.
        """
        x = self.embed(poses) + self.of_joint
        step = None
        for number in range(self.sizes.depth):
            if method is not None and number == method.layer:
                tokens = shown(x)
                step = method.reduce(tokens, method.frames * x.shape[2])
                x = step.apply(x.flatten(1, 2)).unflatten(1, (-1, x.shape[2]))
            x = self.layer(number, x)
        if method is not None and method.recover:
            x = method.reinsert(tokens, step.index, x.flatten(1, 2))
            x = x.unflatten(1, (-1, poses.shape[2]))
        return self.head(x)

    def layer(self, number: int, x: Tensor) -> Tensor:
        """(B, F, J, C) states after a layer."""
        frames, joints = x.shape[1:3]
        x = self.spatial_norm(self.spatial[number](x.flatten(0, 1)))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)
        if number == 0:
            x = x + self.of_frame
        x = self.temporal_norm(self.temporal[number](x.flatten(0, 1)))
        return x.unflatten(0, (-1, joints)).transpose(1, 2)

    def load_recorded(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of a recorded model, but for those of the method."""
        names = {
            "Spatial_patch_to_embedding": "embed", "Spatial_norm": "spatial_norm",
            "Temporal_norm": "temporal_norm", "STEblocks": "spatial", "TTEblocks": "temporal",
            "attn.qkv": "projected", "attn.proj": "output", "mlp.fc1": "wide", "mlp.fc2": "narrow",
            "Spatial_pos_embed": "of_joint", "Temporal_pos_embed": "of_frame",
        }  # fmt: skip
        own = {}
        for name, weight in weights.items():
            if name.startswith(("cross_attention", "x_token", "pos_embed_token")):
                continue
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            own[name] = weight[0] if name in ("of_joint", "of_frame") else weight
        self.load_state_dict(own)
