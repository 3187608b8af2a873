"""Ovis2: visual words from a table. Its indicator tokens, which stand around tiles, are text."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower
from foveate.record.tiles import Tiling, join


@register_family("ovis2")
class Ovis2(Family):
    """`Ovis2ForConditionalGeneration` and `Ovis2Model`; each tile counts as an image.

    The first is the thumbnail.
    """

    thumbnail = 0

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def side(self, modality: str) -> int:
        """Side of the cells of patches that share a visual word."""
        return self.config.vision_config.hidden_stride

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles with one indicator in between are of one image: the end of a column or row."""
        images = []
        for tiles in join(spans, lambda end, start: start - end == 1):
            grid, count = None, len(tiles) - 1
            if ids is not None and count:
                _, _, _, row, _ = self.config.visual_indicator_token_ids
                rows = 1 + [ids[end] for _, end in tiles[1:-1]].count(row)
                grid = (rows, count // rows) if count % rows == 0 else None
            images.append(Tiling(len(tiles), grid))
        return images
