"""What heads within an encoder have said of each token, for methods whose tokens leave early."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Canvas:
    """What heads have said of the images of a pass.

    Args:
        logits: (B, V, C) what the last head that looked at a token said of it.
        layer: (B, V) encoder layer after which each token left, -1 for those that stayed.
        stages: for each exit, (B, V, C) `logits` as they were after it, with gradients in training.
        present: for each exit, (B, C, 2) logits of a class being there or not; `None` for heads
            that classify tokens.
        grid: (height, width) of the tokens.
    """

    logits: Tensor
    layer: Tensor
    stages: tuple[Tensor, ...]
    present: tuple[Tensor | None, ...]
    grid: tuple[int, int]

    @property
    def finished(self) -> Tensor:
        """(B, V) tokens that have left."""
        return self.layer >= 0

    def filled(self, final: Tensor) -> Tensor:
        """(B, V, C) logits, those of a last head for tokens that have stayed.

        Args:
            final: (B, V, C) logits by the last head.
        """
        return torch.where(self.finished[..., None], self.logits, final)

    def map(self, final: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, height, width) the same as a map.

        Args:
            final: as in `filled`.
            size: (height, width) in pixels; `None` for one value of each token.
        """
        found = self.filled(final).mT.unflatten(-1, self.grid)
        if size is None:
            return found
        return F.interpolate(found, size=size, mode="bilinear", align_corners=False)
