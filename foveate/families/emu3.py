"""Emu3: codes of a VQ-VAE, embedded like words, with one that ends every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.family import Family, register_family
from foveate.record.boxes import cells


@register_family("emu3")
class Emu3(Family):
    """`Emu3ForConditionalGeneration` and `Emu3Model`; ends of rows are visual tokens too."""

    text_path = "text_model"
    planar = False
    placed_by = ("image_sizes",)

    def grid(self, count: int) -> tuple[int, int]:
        """One row: codes and ends of rows form no single grid."""
        return (1, count)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Codes are what a convolutional encoder says of a neighbourhood."""
        return "visual tokens are codes, made by convolutions over neighbouring patches"

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, in one row each.

        Raises:
            InputError: an image has not as many features as its size says.
        """
        counts, sizes = [len(feature) for feature in pooled], arguments.get("image_sizes")
        for count, size in zip(
            counts, () if sizes is None else sizes[-len(counts) :], strict=False
        ):
            height, width = self._codes(size)
            if count != height * (width + 1):
                raise InputError(
                    f"image_sizes says {height} x {width} visual tokens, with ends of rows "
                    f"{height * (width + 1)}, but there are {count} features; pass the sizes that "
                    "the processor returned with them"
                )
        return [Shape(count, (1, count)) for count in counts]

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
