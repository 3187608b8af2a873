"""HunyuanVL: patches of any grid merged 2 x 2, a newline after every row, M-RoPE.

One of the axes of positions is the number of the image, which transformers 5.23 counts through all
rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.family import register_family
from foveate.families.mrope import MRope
from foveate.record.boxes import cells


@register_family("hunyuan_vl")
class HunyuanVL(MRope):
    """`HunYuanVLForConditionalGeneration` and `HunYuanVLModel`.

    An image is a token that begins it, its rows with a newline each, and a token that ends it; all
    of these are visual tokens. Methods cannot look inside the tower, whose last module adds them.
    """

    places_later_images = False

    tower_path = "vision_tower"
    planar = False
    placed_by = ("image_grid_thw",)

    def grid(self, count: int) -> tuple[int, int]:
        """One row: tokens and newlines form no single grid."""
        return (1, count)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, in one row each.

        Raises:
            InputError: a grid does not have as many cells as the image has features.
        """
        counts, grids = [len(feature) for feature in pooled], arguments.get("image_grid_thw")
        for count, grid in zip(
            counts, () if grids is None else grids[-len(counts) :], strict=False
        ):
            height, width = self._cells(grid)
            if count != height * (width + 1) + 2:
                raise InputError(
                    f"image_grid_thw says {height} x {width} visual tokens, with newlines and ends "
                    f"{height * (width + 1) + 2}, but there are {count} features; pass the grids "
                    "that the processor returned with them"
                )
        return [Shape(count, (1, count)) for count in counts]

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the image; NaN for newlines, and for the tokens that begin and end it."""
        grids, boxes = arguments.get("image_grid_thw"), torch.full((shape.total, 4), torch.nan)
        if grids is not None:
            height, width = self._cells(grids[number])
            rows = boxes[1:-1].view(height, width + 1, 4)
            rows[:, :-1] = cells(height, width).view(height, width, 4)
        return boxes

    def _cells(self, grid: Tensor) -> tuple[int, int]:
        """(height, width) in merged patches."""
        side = self.side("image")
        return int(grid[1]) // side, int(grid[2]) // side
