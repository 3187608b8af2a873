"""InternVL: an InternViT tower, pixel shuffle, an MLP projector. Each tile counts as an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.models.family import register_family
from foveate.models.llava import Llava


@register_family("internvl")
class InternVL(Llava):
    """`InternVLForConditionalGeneration` and `InternVLModel`."""

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return round(1 / self.config.downsample_ratio)

    def class_attention(
        self, modality: str, rows: Tensor, arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """The class token's attention to all patches that pixel shuffle puts into one token."""
        tiles, heads, patches = rows.shape
        side = int(patches**0.5)
        cells = self.base.pixel_shuffle(
            rows.reshape(tiles * heads, side, side, 1), scale_factor=self.config.downsample_ratio
        )
        return list(cells.sum(-1).view(tiles, heads, -1))
