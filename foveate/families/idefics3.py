"""Idefics3 and SmolVLM: tiles of a SigLIP tower, pixel shuffle. Each tile counts as an image.

The same token opens every tile, and closes an image after its last, the thumbnail; before it
there is a line break at the end of a row of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower
from foveate.record.tiles import Tiling, join


@register_family("idefics3", "smolvlm")
class Idefics3(Family):
    """`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`, and base models."""

    text_path = "text_model"

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_model")

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return self.config.scale_factor

    def fed(self, arguments: Mapping[str, Any], images: int | None = None) -> dict[str, Any]:
        """Without tiles that are padding, which are all zero."""
        pixels = arguments.get("pixel_values")
        if pixels is None:
            return dict(arguments)
        tiles = pixels.flatten(0, 1)
        real = tiles.flatten(1).any(1) if images is None else slice(images)
        return {"pixel_values": tiles[real][None]}

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each tile; the features of a sample's tiles come in one tensor."""
        pixels = arguments.get("pixel_values")
        size = self.config.vision_config.image_size if pixels is None else pixels.shape[-1]
        side = size // self.config.vision_config.patch_size // self.side(modality)
        tokens = sum(feature.shape[:-1].numel() for feature in pooled)
        return [Shape(side * side, (side, side))] * (tokens // (side * side))

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles are of one image if one opens after the other and nothing closes before."""
        if ids is None:
            return [Tiling(len(spans))]
        after = spans[-1][1]
        opening = ids[after] if after < len(ids) else -1
        images = []
        for tiles in join(spans, lambda end, start: list(ids[end:start]).count(opening) == 1):
            grid, count = None, len(tiles) - 1
            ends = [n for n, (_, end) in enumerate(tiles[:-1], 1) if ids[end] != opening]
            if ends and ends == list(range(ends[0], count + 1, ends[0])):
                grid = (len(ends), ends[0])
            images.append(Tiling(len(tiles), grid))
        return images
