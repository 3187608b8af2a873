"""Aya Vision and Command A Vision: SigLIP tiles, pixel shuffle, and a Cohere2 text model.

Full-attention layers of Cohere2 have no positions; sliding ones have.
"""

from __future__ import annotations

from typing import Any

from foveate.models.family import Encoder, Family, register_family
from foveate.models.towers import tower


@register_family("aya_vision", "cohere2_vision")
class AyaVision(Family):
    """`AyaVisionForConditionalGeneration`, `Cohere2VisionForConditionalGeneration` and models."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return self.config.downsample_factor

    def rotates(self, layer: int) -> bool:
        """Only layers with a window rotate, as the attention module itself decides."""
        attention: Any = self.layers[layer].self_attn
        return getattr(attention, "sliding_window", True) is not None
