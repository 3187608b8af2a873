"""InternVL: an InternViT tower, pixel shuffle, an MLP projector. Each tile counts as an image.

Tiles of a picture follow one another without text; its thumbnail is the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.models.family import register_family
from foveate.models.llava import Llava
from foveate.tiles import Tiling, join


@register_family("internvl")
class InternVL(Llava):
    """`InternVLForConditionalGeneration` and `InternVLModel`."""

    patches_are_tokens = False

    def pictures(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles without a token in between are of one picture."""
        return [Tiling(len(tiles)) for tiles in join(spans, lambda end, start: end == start)]

    def per_token(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """The mean of the patches that pixel shuffle puts into one token."""
        tiles, heads, patches = rows.shape
        side = int(patches**0.5)
        cells = self.base.pixel_shuffle(
            rows.reshape(tiles * heads, side, side, 1), scale_factor=self.config.downsample_ratio
        )
        return list(cells.mean(-1).view(tiles, heads, -1))
