"""InternVL: an InternViT tower, pixel shuffle, an MLP projector. Each tile counts as an image."""

from __future__ import annotations

from foveate.models.family import register_family
from foveate.models.llava import Llava


@register_family("internvl")
class InternVL(Llava):
    """`InternVLForConditionalGeneration` and `InternVLModel`."""

    def side(self, modality: str) -> int:
        """Side of the cells that pixel shuffle puts into one token."""
        return round(1 / self.config.downsample_ratio)
