"""HunyuanVL: patches of any grid merged 2 x 2, a newline after every row, M-RoPE.

One of the axes of positions is the number of the image, which transformers 5.23 counts through all
rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import register_family
from foveate.families.mrope import MRope
from foveate.families.rows import in_one_row, taken
from foveate.record.boxes import cells


@register_family("hunyuan_vl")
class HunyuanVL(MRope):
    """`HunYuanVLForConditionalGeneration` and `HunYuanVLModel`.

    An image is a token that begins it, its rows with a newline each, and a token that ends it; all
    of these are visual tokens, of which the encoder sees cells alone. Methods inside the encoder
    leave the first and the last, and newlines of rows of which something survives.
    """

    places_later_images = False

    tower_path = "vision_tower"
    planar = False  # tokens and newlines form no single grid
    placed_by = ("image_grid_thw",)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, in one row each.

        Raises:
            InputError: a grid does not have as many cells as the image has features.
        """
        grids = arguments.get("image_grid_thw")
        known = [] if grids is None else [self._cells(grid) for grid in grids[-len(pooled) :]]
        return in_one_row(pooled, "image_grid_thw", known, "newlines and ends", ends=2)

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the image; NaN for newlines, and for the tokens that begin and end it."""
        grids, boxes = arguments.get("image_grid_thw"), torch.full((shape.total, 4), torch.nan)
        if grids is not None:
            height, width = self._cells(grids[number])
            boxes[self._sources(height, width) >= 0] = cells(height, width)
        return boxes

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Cells of each image, with what newlines and ends get."""
        return [
            taken(row.T, source, newline).T
            for row, source in zip(rows, self._all_sources(arguments), strict=True)
        ]

    def follow(
        self, modality: str, surviving: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Cells that survive, newlines of rows with such cells, and ends."""
        found = []
        for cells_left, grid in zip(surviving, arguments["image_grid_thw"], strict=True):
            height, width = self._cells(grid)
            rows = cells_left.view(height, width)
            lines = torch.cat((rows, rows.any(1, keepdim=True)), 1).flatten()
            found.append(torch.nn.functional.pad(lines, (1, 1), value=True))
        return found

    def sources(self, modality: str, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """Cells; a newline and an end stand for the cell before, what begins an image for its
        first.
        """
        if arguments.get("image_grid_thw") is None:
            return super().sources(modality, count, arguments)
        found, start = [], 0
        for source in self._all_sources(arguments):
            found.append(start + source.clamp(min=0).cummax(0).values)
            start += int(source.max()) + 1
        return torch.cat(found)

    def _all_sources(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        return [self._sources(*self._cells(grid)) for grid in arguments["image_grid_thw"]]

    def _sources(self, height: int, width: int) -> Tensor:
        """(V) cell of an image that each visual token is; -1 for newlines and ends."""
        lines = torch.nn.functional.pad(
            torch.arange(height * width).view(height, width), (0, 1), value=-1
        )
        return torch.nn.functional.pad(lines.flatten(), (1, 1), value=-1)

    def _cells(self, grid: Tensor) -> tuple[int, int]:
        """(height, width) in merged patches."""
        side = self.side("image")
        return int(grid[1]) // side, int(grid[2]) // side
