"""Frames: all frames of a video, brought back from those that were kept.

After the token recovering attention of Li et al., "Hourglass Tokenizer for Efficient
Transformer-Based 3D Human Pose Estimation", arXiv:2311.12028, and NationalGAILab/HoT @ 873b5bd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameRecovery(nn.Module):
    """Attention of learned queries to the same place of all frames that were kept.

    Shapes: `G` videos, `F` frames, `K` of them kept, `P` tokens of a frame, `D` width.

    Args:
        width: D.
        frames: F.
        kept: K.
        heads: attention heads.
    """

    def __init__(self, width: int, frames: int, kept: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.zeros(kept, width))
        self.queries = nn.Parameter(torch.zeros(frames, width))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(G, F, P, D) all frames, of (G, K, P, D) those that were kept."""
        query = self.query(self.queries.repeat(len(states), 1, 1))
        query = self._by_head(query)[:, None]
        at_place = states.transpose(1, 2)
        key, value = self._by_head(self.key(at_place)), self._by_head(self.value(at_place))
        scores = query @ key.mT * query.shape[-1] ** -0.5  # (G, P, H, F, K)
        mixed = (scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2)
        return (self.queries + self.output(mixed)).transpose(1, 2)

    def _by_head(self, x: Tensor) -> Tensor:
        """(..., H, N, d) of (..., N, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
