"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: anyres tiles, unpadding, newline rows.

An image is its thumbnail and, if it is large, tiles; the tiles are put together, the padding is
cut off and a newline token ends every row. All of these are visual tokens of their image: newline
tokens count in budgets like others, and the class token gives them no score (-inf).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import register_family
from foveate.families.llava import Llava
from foveate.families.rows import taken
from foveate.record.boxes import cells, cells_of


class AnyRes(Llava):
    """Base of the families that pack tiles."""

    planar = False  # thumbnail, tiles and newlines form no single grid
    placed_by = ("image_sizes", "batch_num_images")
    packing_option: ClassVar[str]
    """The setting that the model's packing takes beside tiles and sizes."""

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens of each image in one row, and frames of each video."""
        shapes = super().shapes(modality, pooled, arguments)
        if modality == "image":
            return shapes
        side = self.video_side
        return [
            Shape(count, (side, side), frames)
            if (frames := count // side**2)
            else Shape(count, row)
            for count, row, _ in shapes
        ]

    def per_token(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Rows of an image's tiles, packed as the model packs their features."""
        if modality != "image" or arguments.get("image_sizes") is None:
            return list(rows)
        sources, rows = self._sources(arguments, rows.shape[2]), rows.transpose(1, 2)
        if not any(map(_mixes, sources)):
            patches = rows.flatten(0, 1)
            return [taken(patches, source, newline).T for source in sources]
        line = torch.full(rows.shape[2:], newline, device=rows.device, dtype=rows.dtype)
        return [image.T for image in self.packed(rows, line, arguments)]  # the host waits

    def unprojected(
        self, modality: str, rows: Tensor, lengths: Sequence[int], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Rows of an image's tiles, packed as the model packs their features."""
        if modality == "video":
            return super().unprojected(modality, rows, lengths, arguments)
        patches = rows.flatten(0, 1)
        return [
            patches.new_full((len(source), patches.shape[1]), torch.nan)
            if _mixes(source)
            else taken(patches, source, 0.0)
            for source in self._sources(arguments, rows.shape[1])
        ]

    def follow(
        self, modality: str, surviving: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Which tokens of the packed tiles survive; a newline does if a token of its line does."""
        if modality == "video":
            return surviving
        patches, sources = torch.cat(list(surviving)), self._sources(arguments)
        return [
            _with_newlines(patches, source.to(patches.device), len(surviving[0]))
            for source in sources
        ]

    def sources(self, modality: str, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """Patches of the packed tiles; a newline stands for the last of its line."""
        if modality == "video" or arguments.get("image_sizes") is None:
            return super().sources(modality, count, arguments)
        source = torch.cat(self._sources(arguments))
        patches = torch.arange(len(source)).masked_fill(source < 0, 0)
        return source[patches.cummax(0).values]

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Packing may interpolate the tokens of an image to fewer."""
        if modality == "video" or arguments.get("image_sizes") is None:
            return ""
        mixed = any(map(_mixes, self._sources(arguments)))
        return "the tokens of an image of so many tiles are interpolated to fewer" if mixed else ""

    def _sources(self, arguments: Mapping[str, Any], patches: int | None = None) -> list[Tensor]:
        """(V) patch of all tiles that each token of an image is: -1 for a newline, -2 for a mean of
        several.

        Args:
            arguments: with `image_sizes`.
            patches: of each tile, with a class token if that is kept; as many as its grid has.
        """
        patches = patches or self.tile_side**2
        number = torch.arange(sum(self.tiles(arguments)) * patches, dtype=torch.double)
        values = torch.stack((number, number**2), -1).view(-1, patches, 2)
        images = self.packed(values, values.new_tensor((-1.0, 1.0)), arguments)
        # The square of a mean is no mean of squares.
        return [
            torch.where(image[:, 0] ** 2 == image[:, 1], image[:, 0], -2.0).long()
            for image in images
        ]

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Boxes of the tokens of thumbnail and tiles, or of a video's frames; NaN for newlines."""
        sizes = arguments.get("image_sizes")
        if modality == "video":
            return cells_of(shape)
        if sizes is None:  # features from elsewhere
            return torch.full((shape.total, 4), torch.nan)
        tiles = [
            self._tile_boxes(size if n > 1 else None)
            for size, n in zip(torch.as_tensor(sizes).tolist(), self.tiles(arguments), strict=True)
        ]
        newline = torch.full((4,), torch.nan)
        boxes = self.packed(torch.cat(tiles), newline, arguments)[number]
        thumbnail, tiled = boxes.split([len(tiles[0][0]), len(boxes) - len(tiles[0][0])])
        return torch.cat((thumbnail, _widen(tiled))).clamp(0, 1)

    def packed(
        self, values: Tensor, newline: Tensor, arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(V, C) values of each image's visual tokens, by the model's own packing.

        Args:
            values: (N, P, C) values of the P patches of all N tiles.
            newline: (C,) what newline tokens get.
            arguments: with `image_sizes`.
        """
        name = self.packing_option
        packed, _ = self.base.pack_image_features(
            values.split(self.tiles(arguments)),
            arguments["image_sizes"],
            image_newline=newline,
            **{name: getattr(self.config, name)},
        )
        return packed

    def tiles(self, arguments: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, its thumbnail among them."""
        sizes, images = arguments["image_sizes"], arguments.get("batch_num_images")
        tiled = [True] * len(sizes)
        if images is not None:  # OneVision tiles an image only if its sample has no other
            tiled = [int(n) == 1 for n in images for _ in range(int(n))]
        count = self._module.image_size_to_num_patches
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [
            count(size, pinpoints, side) if several else 1
            for size, several in zip(sizes, tiled, strict=True)
        ]

    @property
    def video_side(self) -> int:
        """Side of a video frame's grid after pooling."""
        raise NotImplementedError

    @property
    def tile_side(self) -> int:
        """Side of a tile in tokens."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def _module(self) -> Any:
        return sys.modules[type(self.base).__module__]

    def _tile_boxes(self, size: list[int] | None) -> Tensor:
        """(N, P, 4) boxes of the patches in an image's thumbnail and tiles.

        Processors scale an image of `size` (height, width) to the canvas of its tiles and centre
        it there; without a size there is only the thumbnail.
        """
        vision, side = self.config.vision_config, self.tile_side
        thumbnail = cells(side, side)[None]
        if size is None:
            return thumbnail
        rows, columns = self._module.get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, vision.image_size
        )
        canvas = torch.tensor([columns, rows, columns, rows]) * vision.image_size
        image = torch.tensor([size[1], size[0], size[1], size[0]])
        scale = (canvas / image).min()
        margin = (canvas - image * scale) / 2
        boxes = (cells(rows * side, columns * side) * canvas - margin) / (image * scale)
        boxes = boxes.view(rows, side, columns, side, 4).transpose(1, 2).reshape(-1, side**2, 4)
        return torch.cat((thumbnail, boxes))


def _mixes(source: Tensor) -> bool:
    """Whether tokens of an image are means of several patches, as `_sources` says."""
    return bool((source < -1).any())


def _with_newlines(surviving: Tensor, source: Tensor, thumbnail: int) -> Tensor:
    """(V) which tokens of a packed image survive.

    Args:
        surviving: (P) which patches of all tiles do.
        source: (V) the patch of each token, or -1 for a newline.
        thumbnail: patches of a thumbnail, which comes before the lines unless it is alone.
    """
    newline, tokens = source < 0, surviving[source.clamp(min=0)] & (source >= 0)
    line = newline.cumsum(0) - newline.long()
    in_line = tokens.clone()
    if len(source) > thumbnail + 1:
        in_line[:thumbnail] = False
    lives = torch.zeros_like(line).index_add(0, line, in_line.long()) > 0
    return tokens | (newline & lives[line])


def _widen(boxes: Tensor) -> Tensor:
    """(V, 4) boxes of packed tiles, as large as the distance between neighbours.

    Packing may interpolate to fewer tokens, which moves centres rightly but leaves boxes small.
    """
    ends = boxes[:, 0].isnan().nonzero()
    if not len(ends) or not int(ends[0]):
        return boxes
    lines = boxes.view(-1, int(ends[0]) + 1, 4).clone()
    centres = (lines[:, :-1, :2] + lines[:, :-1, 2:]) / 2
    half = (lines[:, :-1, 2:] - lines[:, :-1, :2]) / 2
    if centres.shape[1] > 1:
        half[..., 0] = (centres[0, 1, 0] - centres[0, 0, 0]) / 2
    if centres.shape[0] > 1:
        half[..., 1] = (centres[1, 0, 1] - centres[0, 0, 1]) / 2
    lines[:, :-1] = torch.cat((centres - half, centres + half), -1)
    return lines.view(-1, 4)


@register_family("llava_next", "llava_next_video")
class LlavaNext(AnyRes):
    """`LlavaNextForConditionalGeneration`, the video variant, and their base models."""

    packing_option = "vision_feature_select_strategy"

    def side(self, modality: str) -> int:
        """Side of the cells that a video's frames are pooled by."""
        return 1 if modality == "image" else self.config.spatial_pool_stride

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """A learned pooling of a video's frames is wider than a cell."""
        if modality == "video" and self.config.spatial_pool_mode == "conv":
            return "frames are pooled by a convolution"
        return super().mixing(modality, arguments)

    def per_token(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Rows of a video's frames, pooled as the model pools their features."""
        if modality == "image" or self.config.spatial_pool_mode == "conv":
            return super().per_token(modality, rows, arguments, newline)
        pooled = self.base.vision_resampler(rows.transpose(1, 2))
        frames = arguments["pixel_values_videos"].shape[1]
        return list(pooled.unflatten(0, (-1, frames)).flatten(1, 2).transpose(1, 2))

    @property
    def video_side(self) -> int:
        """Side of a video frame's grid after pooling."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.spatial_pool_stride


@register_family("llava_onevision")
class LlavaOnevision(AnyRes):
    """`LlavaOnevisionForConditionalGeneration` and its base model.

    A video is its pooled frames and one newline token after them.
    """

    packing_option = "vision_aspect_ratio"

    def projector(self, modality: str) -> Any:
        """None for videos, whose tokens are interpolated after it."""
        return None if modality == "video" else super().projector(modality)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """A video's frames are interpolated to half their size."""
        if modality == "video":
            return "frames are interpolated to fewer tokens"
        return super().mixing(modality, arguments)

    def per_token(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Rows of a video's frames, interpolated as the model does with their features."""
        if modality == "image":
            return super().per_token(modality, rows, arguments, newline)
        pooled = self.base.apply_pooling(rows.transpose(1, 2))
        frames = arguments["pixel_values_videos"].shape[1]
        videos = pooled.unflatten(0, (-1, frames)).flatten(1, 2).transpose(1, 2)
        return list(torch.nn.functional.pad(videos, (0, 1), value=newline))

    @property
    def video_side(self) -> int:
        """Side of a video frame's grid after pooling to half, rounded up."""
        vision = self.config.vision_config
        return -(-(vision.image_size // vision.patch_size) // 2)
