"""LFM2-VL: a SigLIP2 tower on images of any shape, cells merged into tokens, and a text model with
short convolutions between its attention layers. Each tile counts as an image.

A named token stands before every tile; the last tile of a picture is its thumbnail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from foveate.families.family import register_family
from foveate.families.gridded import Gridded
from foveate.families.rows import raster_rows
from foveate.record.tiles import Tiling, join


@register_family("lfm2_vl")
class Lfm2VL(Gridded):
    """`Lfm2VlForConditionalGeneration` and `Lfm2VlModel`."""

    grid_names: ClassVar[Mapping[str, str]] = {"image": "spatial_shapes"}
    tower_path = "vision_tower"

    def side(self, modality: str) -> int:
        """Side of the cells that pixel unshuffle puts into one token."""
        return self.config.downsample_factor

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Images are rows of a padded batch, which would lose different numbers of tokens."""
        return (
            "its encoder pads images of different sizes to rows of one length, from which only "
            "equally many tokens could be removed"
        )

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Means of cells, of the patches before each image's padding."""
        cells = [
            raster_rows(height, width, self.side(modality)).to(rows.device)
            for height, width in arguments["spatial_shapes"].tolist()
        ]
        return [row[:, cell].mean(-1) for row, cell in zip(rows, cells, strict=True)]

    def pictures(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles with one token in between, the name of a tile, are of one picture."""
        return [Tiling(len(tiles)) for tiles in join(spans, lambda end, start: start - end == 1)]
