"""Idefics3 and SmolVLM: tiles of a SigLIP tower, pixel shuffle. Each tile counts as an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.models.family import Encoder, Family, register_family
from foveate.models.towers import tower
from foveate.tokens import Shape


@register_family("idefics3", "smolvlm")
class Idefics3(Family):
    """`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`, and base models."""

    text_path = "text_model"

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_model")

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each tile; the features of a sample's tiles come in one tensor."""
        pixels = arguments.get("pixel_values")
        size = self.config.vision_config.image_size if pixels is None else pixels.shape[-1]
        side = size // self.config.vision_config.patch_size // self.config.scale_factor
        tokens = sum(feature.shape[:-1].numel() for feature in pooled)
        return [Shape(side * side, (side, side))] * (tokens // (side * side))
