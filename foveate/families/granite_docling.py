"""Granite Docling: tiles of a SigLIP tower, pixel shuffle on one of two routes, DeepStack.

Each tile counts as an image. The tower's last module reads layers of it together, so that methods
cannot look inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core.tokens import Shape
from foveate.families.family import Family, register_family


@register_family("granite_docling")
class GraniteDocling(Family):
    """`GraniteDoclingForConditionalGeneration` and `GraniteDoclingModel`."""

    text_path = "text_model"

    @property
    def first_llm_layer(self) -> int:
        """After the last layer to whose output encoder features are added (DeepStack)."""
        return len(self.config.vision_config.deepstack_visual_indexes)

    def fed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Without tiles that are padding, which the mask says."""
        pixels, real = arguments.get("pixel_values"), arguments.get("pixel_attention_mask")
        if pixels is None or real is None:
            return dict(arguments)
        kept = {"pixel_values": pixels[real][None], "pixel_attention_mask": real[real][None]}
        return {**arguments, **kept}

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each tile; the features of a sample's tiles come in one tensor."""
        vision = self.config.vision_config
        fine = arguments.get("tile_fine_mask") is not None
        side = vision.image_size // vision.patch_size // (vision.scale_factor // (1 + fine))
        tokens = sum(feature.shape[:-1].numel() for feature in pooled)
        return [Shape(side * side, (side, side))] * (tokens // (side * side))
