"""Granite Docling: tiles of a SigLIP tower, pixel shuffle on one of two routes, DeepStack.

Each tile counts as an image. The route of a batch says the side of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.rows import cell_means, raster_rows
from foveate.families.towers import tower


@register_family("granite_docling")
class GraniteDocling(Family):
    """`GraniteDoclingForConditionalGeneration` and `GraniteDoclingModel`."""

    text_path = "text_model"

    @property
    def first_llm_layer(self) -> int:
        """After the last layer to whose output encoder features are added (DeepStack)."""
        return len(self.config.vision_config.deepstack_visual_indexes)

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; its last module reads several of its layers."""
        return tower(self, "vision_model")

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token, on the coarse route."""
        return self.config.vision_config.scale_factor

    def tower_side(self, modality: str, arguments: Mapping[str, Any]) -> int:
        """Half as much on the fine route."""
        return self._side(bool(arguments.get("fine")))

    def _side(self, fine: bool) -> int:
        return self.config.vision_config.scale_factor // (1 + fine)

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Means of cells, whose side the route says."""
        side = self._side(arguments.get("tile_fine_mask") is not None)
        return cell_means(rows, raster_rows(*self.grid(rows.shape[-1]), side))

    def fed(self, arguments: Mapping[str, Any], images: int | None = None) -> dict[str, Any]:
        """Without tiles that are padding, which the mask says."""
        pixels, real = arguments.get("pixel_values"), arguments.get("pixel_attention_mask")
        if pixels is None or real is None:
            return dict(arguments)
        kept = pixels[real] if images is None else pixels.flatten(0, 1)[:images]
        every = real.new_ones(1, len(kept))
        return {**arguments, "pixel_values": kept[None], "pixel_attention_mask": every}

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each tile; the features of a sample's tiles come in one tensor."""
        vision = self.config.vision_config
        cell = self._side(arguments.get("tile_fine_mask") is not None)
        side = vision.image_size // vision.patch_size // cell
        tokens = sum(feature.shape[:-1].numel() for feature in pooled)
        return [Shape(side * side, (side, side))] * (tokens // (side * side))
