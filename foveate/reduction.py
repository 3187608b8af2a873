"""Reduction: the linear map from V tokens to K, as a value.

Shapes: `G` images of equal size, `V` visual tokens of an image, `K` kept, `D` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reduction:
    """Which tokens survive, and what they become.

    Args:
        index: (G, K) position of each survivor among the V tokens, ascending and unique. A merged
            token stands at the position of the source that it replaces.
        weights: (G, K, V) the value of each survivor as a weighted sum of all tokens, or `None`
            when survivors keep their own value (pruning).
    """

    index: Tensor
    weights: Tensor | None = None

    @classmethod
    def top(cls, scores: Tensor, count: int) -> Reduction:
        """Keep the `count` highest of (G, V) scores, in their original order."""
        index = scores.topk(count, dim=-1).indices
        return cls(index.sort(dim=-1).values)

    @property
    def kept(self) -> int:
        """Number of survivors of each image, K."""
        return self.index.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        """Map (G, V, D) to (G, K, D)."""
        if self.weights is None:
            return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))
        return torch.matmul(self.weights.to(x.dtype), x)
