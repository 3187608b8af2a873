"""Aria, DeepSeek-OCR 2 and Idefics2: learned queries read each tile and become its tokens.

Such tokens have no place in the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import Family, register_family


class Latents(Family):
    """Base of families whose visual tokens are queries."""

    planar = False  # queries lie on no grid

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Every query reads all patches of its tile."""
        return "visual tokens are learned queries, each of which reads all patches"

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """NaN: queries have no place."""
        return torch.full((shape.total, 4), torch.nan)


@register_family("aria")
class Aria(Latents):
    """`AriaForConditionalGeneration` and `AriaModel`; each tile counts as an image."""


@register_family("deepseek_ocr2")
class DeepseekOCR2(Latents):
    """`DeepseekOcr2ForConditionalGeneration` and `DeepseekOcr2Model`.

    An image is its local views, then the view of all of it and a separator, all visual tokens.
    """


@register_family("idefics2")
class Idefics2(Latents):
    """`Idefics2ForConditionalGeneration` and `Idefics2Model`; each tile counts as an image."""

    text_path = "text_model"

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Queries of each tile; the features of a sample's tiles come in one tensor."""
        queries = self.config.perceiver_config.resampler_n_latents
        tokens = sum(feature.shape[:-1].numel() for feature in pooled)
        return [Shape(queries, self.grid(queries))] * (tokens // queries)
