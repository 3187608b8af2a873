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

from foveate.models.family import register_family
from foveate.models.llava import Llava


class AnyRes(Llava):
    """Base of the families that pack tiles."""

    patches_are_tokens = False
    packing_option: ClassVar[str]
    """The setting that the model's packing takes beside tiles and sizes."""

    def grid(self, count: int) -> tuple[int, int]:
        """One row: thumbnail, tiles and newlines form no single grid."""
        return (1, count)

    def class_attention(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Rows of an image's tiles, packed as the model packs their features."""
        if modality != "image" or arguments.get("image_sizes") is None:
            return list(rows)
        newline = torch.full(rows.shape[1:2], -torch.inf, device=rows.device)
        return [image.T for image in self.packed(rows.transpose(1, 2), newline, arguments)]

    def packed(
        self, values: Tensor, newline: Tensor, arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(V, C) values of each image's visual tokens, by the model's own packing.

        Args:
            values: (N, P, C) values of the P patches of all N tiles.
            newline: (C,) what newline tokens get.
            arguments: with `image_sizes`.
        """
        sizes = arguments["image_sizes"]
        singles = arguments.get("batch_num_images")
        tiled = [True] * len(sizes)
        if singles is not None:
            tiled = [int(n) == 1 for n in singles for _ in range(int(n))]
        tiles_of = sys.modules[type(self.base).__module__].image_size_to_num_patches
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        counts = [
            tiles_of(size, pinpoints, side) if tile else 1
            for size, tile in zip(sizes, tiled, strict=True)
        ]
        name = self.packing_option
        packed, _ = self.base.pack_image_features(
            values.split(counts), sizes, image_newline=newline, **{name: getattr(self.config, name)}
        )
        return packed


@register_family("llava_next", "llava_next_video")
class LlavaNext(AnyRes):
    """`LlavaNextForConditionalGeneration`, the video variant, and their base models.

    A video is one grid of pooled frames, one below the other.
    """

    packing_option = "vision_feature_select_strategy"

    def shapes(
        self, modality: str, pooled: Any, arguments: Mapping[str, Any]
    ) -> list[tuple[int, tuple[int, int]]]:
        """Tokens and grid of each image or video."""
        shapes = super().shapes(modality, pooled, arguments)
        if modality == "image":
            return shapes
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.spatial_pool_stride
        return [(count, (count // side, side)) for count, _ in shapes]


@register_family("llava_onevision")
class LlavaOnevision(AnyRes):
    """`LlavaOnevisionForConditionalGeneration` and its base model.

    A video is its pooled frames and one newline token behind them.
    """

    packing_option = "vision_aspect_ratio"
