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

    patches_are_tokens = False

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
