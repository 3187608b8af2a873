"""Emu3: codes of a VQ-VAE, embedded like words, with one that ends every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.codes import Codes
from foveate.families.family import register_family
from foveate.families.rows import in_one_row
from foveate.record.boxes import cells


@register_family("emu3")
class Emu3(Codes):
    """`Emu3ForConditionalGeneration` and `Emu3Model`; ends of rows are visual tokens too."""

    text_path = "text_model"
    planar = False  # codes and ends of rows form no single grid
    placed_by = ("image_sizes",)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, in one row each.

        Raises:
            InputError: an image has not as many features as its size says.
        """
        sizes = arguments.get("image_sizes")
        known = [] if sizes is None else [self._codes(size) for size in sizes[-len(pooled) :]]
        return in_one_row(pooled, "image_sizes", known, "ends of rows")

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the image; NaN for ends of rows."""
        sizes, boxes = arguments.get("image_sizes"), torch.full((shape.total, 4), torch.nan)
        if sizes is not None:
            height, width = self._codes(sizes[number])
            boxes.view(height, width + 1, 4)[:, :-1] = cells(height, width).view(height, width, 4)
        return boxes

    def _codes(self, size: Any) -> tuple[int, int]:
        """(height, width) in codes of an image of (height, width) pixels."""
        side = 2 ** (len(self.config.vq_config.channel_multiplier) - 1)
        return int(size[0]) // side, int(size[1]) // side
