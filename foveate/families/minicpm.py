"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: a SigLIP tower on images of any shape, cells merged into
tokens, and Qwen3.5's text model. Each slice, and each frame of a video, counts as an image.

An image's thumbnail comes first; its slices follow, between tokens that open and close each.
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
from foveate.families.rows import EncoderImage, cut, packed, pixels_of_rows
from foveate.record.tiles import Tiling

GAP = 3  # tokens between two slices of an image at most: closing, line break, opening


@register_family("minicpmv4_6", "minicpm_ocr")
class MiniCPM(Gridded):
    """`MiniCPMV4_6ForConditionalGeneration`, `MiniCPMOcrForConditionalGeneration`, their models."""

    grid_names: ClassVar[Mapping[str, str]] = {
        "image": "target_sizes",
        "video": "target_sizes_videos",
    }
    tower_path = "vision_tower"
    thumbnail = 0

    def side(self, modality: str) -> int:
        """Side of the cells that become one token, with the config's `downsample_mode`."""
        return self._side(self.config.downsample_mode)

    def sides(self, modality: str, images: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        """The same with the mode of a call."""
        return [self._side(self._mode(arguments))] * images

    def _side(self, mode: str) -> int:
        merged = self.config.merge_kernel_size[0] ** self.config.merger_times
        return merged if mode == "4x" else 2 * merged

    def _mode(self, arguments: Mapping[str, Any]) -> str:
        return arguments.get("downsample_mode") or self.config.downsample_mode

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; in the modes with fewer tokens it has fewer rows
        from some layer on.
        """
        found = super().encoder
        if found is None:
            return None
        later = self.config.insert_layer_id + 1, self._rows_later
        return replace(found, packed=self._rows, later=later, pixels=self._pixels)

    def _rows(self, arguments: Mapping[str, Any], side: int) -> list[EncoderImage]:
        """Rows of each image, all in raster order; `arguments` are the tower's."""
        sizes = [(1, height, width) for height, width in arguments["target_sizes"].tolist()]
        side = self._side("16x" if arguments.get("use_vit_merger", True) else "4x")
        return packed(sizes, [side] * len(sizes), raster=True)

    def _pixels(self, arguments: Mapping[str, Any], side: int) -> list[Tensor]:
        """Pixels of the tokens of each image, whose patches stand side by side in one strip."""
        patch = self.config.vision_config.patch_size
        (patches,) = cut(arguments["pixel_values"], (patch, patch)).flatten(1, 2)
        return pixels_of_rows(patches, self._rows(arguments, side))

    def _rows_later(self, arguments: Mapping[str, Any], side: int) -> list[EncoderImage]:
        """The same once windows of 2 x 2 patches have become rows, if they do."""
        if not arguments.get("use_vit_merger", True):
            return self._rows(arguments, side)
        sizes = [
            (1, height // 2, width // 2) for height, width in arguments["target_sizes"].tolist()
        ]
        return packed(sizes, [self._side("16x") // 2] * len(sizes), raster=True)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """All modes but one have an attention between layers, which merges windows."""
        if self._mode(arguments) == "4x":
            return ""
        return "its encoder merges windows of 2 x 2 patches between two of its layers"

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Slices follow a thumbnail closely, and another token opens them."""
        if ids is None:
            return [Tiling(1)] * len(spans)
        images: list[list[tuple[int, int]]] = []
        for start, end in spans:
            near = bool(images) and start - images[-1][-1][1] in (2, GAP)
            if near and ids[start - 1] != ids[images[-1][0][0] - 1]:
                images[-1].append((start, end))
            else:
                images.append([(start, end)])
        return [Tiling(len(tiles), _grid(tiles)) for tiles in images]


def _grid(tiles: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """(rows, columns) of slices after their thumbnail: rows end with a line break."""
    slices = tiles[1:]
    ends = [
        number
        for number, (before, after) in enumerate(pairwise(slices), 1)
        if after[0] - before[1] == GAP
    ]
    columns = ends[0] if ends else len(slices)
    regular = [*ends, len(slices)] == list(range(columns, len(slices) + 1, columns or 1))
    return (len(slices) // columns, columns) if slices and regular else None


@register_family("minicpmv4_7")
class MiniCPMV47(MiniCPM):
    """`MiniCPMV4_7ForConditionalGeneration` and `MiniCPMV4_7Model`: positions on a canvas."""

    one_dimensional = False
    places_later_images = False
