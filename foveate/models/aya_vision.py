"""Aya Vision and Command A Vision: SigLIP tiles, pixel shuffle, and a Cohere2 text model.

Full-attention layers of Cohere2 have no positions; sliding ones have.
"""

from __future__ import annotations

from typing import Any

from foveate.models.family import Family, register_family


@register_family("aya_vision", "cohere2_vision")
class AyaVision(Family):
    """`AyaVisionForConditionalGeneration`, `Cohere2VisionForConditionalGeneration` and models."""

    def rotates(self, layer: int) -> bool:
        """Only layers with a window rotate, as the attention module itself decides."""
        attention: Any = self.layers[layer].self_attn
        return getattr(attention, "sliding_window", True) is not None
