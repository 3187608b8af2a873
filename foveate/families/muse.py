"""Muse Spark and Muse Glimmer: patches of any grid merged 2 x 2, plain positions, sliding and full
attention. Full layers, as a rule, do not rotate, and are handed no rotary positions.

The tower orders patches, not cells, by windows. Audio is text to foveate.
"""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("muse_spark", "muse_glimmer")
class Muse(Gridded):
    """`MuseSparkForConditionalGeneration`, `MuseGlimmerForConditionalGeneration` and models."""

    tower_path = "vision_tower"
    rotary_where_rotated = True

    def side(self, modality: str) -> int:
        """Side of the cells of patches that pixel shuffle puts into one token."""
        return self.config.vision_config.merge_size

    def rotates(self, layer: int) -> bool:
        """Whether the layer has a rotary base."""
        return bool(self.text.config.layer_rope_theta[layer])
