"""InternVL: an InternViT tower, pixel shuffle, an MLP projector. Each tile counts as an image.

Tiles of an image follow one another without text; its thumbnail is the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveate.families.family import register_family
from foveate.families.llava import Llava
from foveate.record.tiles import Tiling, join


@register_family("internvl")
class InternVL(Llava):
    """`InternVLForConditionalGeneration` and `InternVLModel`."""

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return round(1 / self.config.downsample_ratio)

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles without a token in between are of one image."""
        return [Tiling(len(tiles)) for tiles in join(spans, lambda end, start: end == start)]
