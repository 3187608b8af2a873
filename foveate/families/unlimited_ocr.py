"""Unlimited-OCR: local views and one of the whole page, each from two towers, with newlines.

Layers see all of the first prompt and a window of what follows it. In a session with images their
cache layers are such as know where each slot stood, also before removal: masks of transformers 5.23
show a batch's padding once the window has moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import Family, register_family


@register_family("unlimited_ocr")
class UnlimitedOCR(Family):
    """`UnlimitedOcrForConditionalGeneration` and `UnlimitedOcrModel`.

    An image is its local views in rows that end in newlines, then the whole of it likewise, and a
    separator, all visual tokens.
    """

    planar = False  # views and newlines form no single grid

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """All: of the first prompt, which alone may have images, they see the whole."""
        return self.keyed_layers

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """A token is a row of CLIP's layers and what SAM's convolutions make of that place."""
        return "visual tokens are made by convolutions over neighbouring patches"

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """NaN: the sizes of views are not known."""
        return torch.full((shape.total, 4), torch.nan)
