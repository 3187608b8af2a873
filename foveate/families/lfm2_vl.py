"""LFM2-VL: a SigLIP2 tower on images of any shape, cells merged into tokens, and a text model with
short convolutions between its attention layers. Each tile counts as an image.

A token that names it stands before every tile; names are numbered by rows, with gaps between these.
The last tile of an image is its thumbnail, unless the processor leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.gridded import Gridded
from foveate.families.rows import EncoderImage, pixels_of_rows, raster_rows, token_grid
from foveate.record.tiles import Tiling, join


@register_family("lfm2_vl")
class Lfm2VL(Gridded):
    """`Lfm2VlForConditionalGeneration` and `Lfm2VlModel`."""

    grid_names: ClassVar[Mapping[str, str]] = {"image": "spatial_shapes"}
    tower_path = "vision_tower"

    def side(self, modality: str) -> int:
        """Side of the cells that pixel unshuffle puts into one token."""
        return self.config.downsample_factor

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; images are rows of one length, with padding."""
        found = super().encoder
        if found is None:
            return None
        return replace(found, packed=_rows, padded=True, pixels=_pixels)

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles with one token in between, the name of a tile, are of one image."""
        images = join(spans, lambda end, start: start - end == 1)
        if ids is None:
            return [Tiling(len(tiles)) for tiles in images]
        return [_tiling([ids[start - 1] for start, _ in tiles]) for tiles in images]


def _rows(arguments: Mapping[str, Any], side: int) -> list[EncoderImage]:
    """Rows of each image: patches in raster order, before its padding."""
    length = arguments["pixel_values"].shape[1]
    return [
        EncoderImage(token_grid(h, w, side), raster_rows(h, w, side) + number * length)
        for number, (h, w) in enumerate(arguments["spatial_shapes"].tolist())
    ]


def _pixels(arguments: Mapping[str, Any], side: int) -> list[Tensor]:
    """Pixels of the tokens of each image."""
    return pixels_of_rows(arguments["pixel_values"].flatten(0, 1), _rows(arguments, side))


def _tiling(names: Sequence[int]) -> Tiling:
    """The arrangement of tiles with these names, the thumbnail's last if there is one."""
    count = len(names)
    for tiles, thumbnail in ((names, False), (names[:-1], True)):
        if len(tiles) > 1 and (columns := _columns(tiles)):
            return Tiling(count, (len(tiles) // columns, columns), thumbnail)
    return Tiling(count)


def _columns(names: Sequence[int]) -> int:
    """Tiles in a row, if names go on by 1 within rows and by one larger step between; else 0."""
    steps = [after - before for before, after in pairwise(names)]
    columns = next((n for n, step in enumerate(steps, 1) if step != 1), len(names))
    rows, rest = divmod(len(names), columns)
    jump = steps[columns - 1] if rows > 1 else 1
    regular = not rest and steps == ([1] * (columns - 1) + [jump]) * (rows - 1) + [1] * (
        columns - 1
    )
    return columns if regular and (rows == 1 or jump > 1) else 0
