"""LLaVA-1.5 and VipLLaVA: a tower on a fixed grid, or Pixtral's; an MLP projector, a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower


@register_family("llava", "vipllava")
class Llava(Family):
    """`LlavaForConditionalGeneration`, `VipLlavaForConditionalGeneration` and their base models."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower; its class token, if it has one, must not be a visual token."""
        encoder = tower(self, "vision_tower")
        strategy = getattr(self.config, "vision_feature_select_strategy", "default")
        if encoder is None or (encoder.class_token and strategy == "full"):
            return None
        if strategy == "default" and not encoder.class_token:  # the first patch is taken off
            return replace(encoder, block=None)
        return encoder

    def projector(self, modality: str) -> Any:
        """An MLP, one row at a time."""
        return self.base.multi_modal_projector

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each image; Pixtral's towers take images of any shape."""
        shapes, sizes = super().shapes(modality, pooled, arguments), arguments.get("image_sizes")
        if self.config.vision_config.model_type != "pixtral" or sizes is None:
            return shapes
        side = self.config.vision_config.patch_size * self.side("image")
        grids = [(int(h) // side, int(w) // side) for h, w in sizes]
        return [Shape(shape.total, grid) for shape, grid in zip(shapes, grids, strict=True)]
