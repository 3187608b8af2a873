"""Aya Vision and Command A Vision: SigLIP tiles, pixel shuffle, and a Cohere2 text model.

Full-attention layers of Cohere2 have no positions; sliding ones have. Each tile counts as an image,
and the last of an image is its thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower
from foveate.record.tiles import Tiling, join

NAME = 8  # tokens that the name of a tile, such as TILE_1, has at most


@register_family("aya_vision")
class AyaVision(Family):
    """`AyaVisionForConditionalGeneration` and `AyaVisionModel`."""

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

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles with a name in between are of one image, after which stands an end token."""
        if ids is None:
            return [Tiling(len(spans))]
        after = spans[-1][1]
        closing = ids[after] if after < len(ids) else None

        def together(end: int, start: int) -> bool:
            return start - end <= NAME and closing not in ids[end:start]

        return [Tiling(len(tiles)) for tiles in join(spans, together)]


@register_family("cohere2_vision")
class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration` and `Cohere2VisionModel`."""

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles with one token in between, a line break, are of one image."""
        return [Tiling(len(tiles)) for tiles in join(spans, lambda end, start: start - end == 1)]
