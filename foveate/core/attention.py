"""LayerAttention: what a method sees of the attention of an encoder layer, before that is computed.

Shapes: `B` images, `H` heads, `N` rows of an image: special rows, then those of its `V` visual
tokens, of which each has `R`; `d` of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class LayerShape(NamedTuple):
    """What the attention of an encoder layer works on, of one image.

    Args:
        rows: N, special rows included.
        special: rows before the visual tokens.
        grid: (height, width) of the patches, of one frame in a video, before any was removed.
        frames: frames of a video, one after the other; 1 for an image.
        width: of a row.
        attended: width of all heads; 0 for that of a row.
    """

    rows: int
    special: int
    grid: tuple[int, int]
    frames: int
    width: int
    attended: int = 0

    @classmethod
    def of(
        cls, rows: int, special: int, grid: tuple[int, int], frames: int, width: int, mixed: int
    ) -> LayerShape:
        """The same, of what is known: `mixed` is the width of all heads."""
        return cls(rows, special, grid, frames, width, mixed if mixed != width else 0)

    @property
    def mixed(self) -> int:
        """Width of all heads."""
        return self.attended or self.width


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """Queries, keys and values of a layer, which a method may attend with as it likes.

    Args:
        query: (B, H, N, d) queries, with rotary positions where the encoder has them.
        key: (B, H, N, d) keys, likewise.
        value: (B, H, N, d) values.
        mask: (B or 1, 1, N or 1, N) what the encoder adds to the scores; `None` for nothing.
        scaling: what scores are multiplied with.
        rows: (V, R) rows of each visual token; the others are special.
        states: (B, N, D) what the layer's attention is given: its input, normed.
        shape: what there is of each image. Rows after the special ones are patches in raster
            order, frame by frame, for a step that reads whole grids.
        kernel: attends as the model does, from queries (B, H, M, d), keys, values and a mask, and
            returns (B, M, H, d).
        dropout: share of the weights that is to be dropped, in training; `kernel` does so itself.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    rows: Tensor
    states: Tensor
    shape: LayerShape
    kernel: Kernel
    dropout: float = 0.0

    @property
    def special(self) -> int:
        """Rows before those of the visual tokens."""
        return self.query.shape[2] - self.rows.numel()

    def of_tokens(self, values: Tensor) -> Tensor:
        """(..., V) mean over the rows of each token, from (..., N) of all rows."""
        return values[..., self.rows].mean(-1)

    @property
    def bias(self) -> Tensor | None:
        """The mask as numbers that are added to the scores."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return self.mask
        least = torch.finfo(self.query.dtype).min
        return torch.zeros_like(self.mask, dtype=self.query.dtype).masked_fill(~self.mask, least)

    def plain(self) -> Tensor:
        """(B, N, H, d) what the layer computes without a method."""
        return self.kernel(self.query, self.key, self.value, self.mask)
