"""Apertus 1.5: codes of an image, embedded like words, in rows that end with a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.codes import Codes
from foveate.families.family import register_family


@register_family("apertus1p5")
class Apertus1p5(Codes):
    """`Apertus1p5ForConditionalGeneration` and `Apertus1p5Model`; ends of rows are text."""

    text_path = "language_model"
    placed_by = ("image_sizes",)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids of codes.

        Raises:
            InputError: an image has not as many features as its size says.
        """
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return super().shapes(modality, pooled, arguments)
        side, counts = self.config.vision_config.spatial_scale_factor, [len(x) for x in pooled]
        grids = [(int(height) // side, int(width) // side) for height, width in sizes.tolist()]
        shapes = list(map(Shape, counts, grids[-len(counts) :]))
        for count, (height, width), _ in shapes:
            if count != height * width:
                raise InputError(
                    f"image_sizes says {height} x {width} visual tokens, but there are {count} "
                    "features; pass image_sizes as the processor returned it with them"
                )
        return shapes
