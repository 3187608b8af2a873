"""LFM3-VL: a tower with convolutions over patches of any grid merged 2 x 2, and a text model with
short convolutions, windows and full attention. Its positions are a single number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("lfm3_vl")
class Lfm3VL(Gridded):
    """`Lfm3VlForConditionalGeneration` and `Lfm3VlModel`."""

    tower_path = "vision_tower"

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Layers of the tower need the whole grid."""
        return "convolutions between the layers of its encoder mix neighbouring patches"

    @property
    def unread(self) -> str:
        """The last layer of published towers is a convolution, which methods would read."""
        return "convolutions among the layers of its encoder have no attention"
