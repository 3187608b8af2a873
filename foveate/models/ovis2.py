"""Ovis2: visual words from a table. Its indicator tokens, which stand around tiles, are text."""

from __future__ import annotations

from foveate.models.family import Encoder, Family, register_family
from foveate.models.towers import tower


@register_family("ovis2")
class Ovis2(Family):
    """`Ovis2ForConditionalGeneration` and `Ovis2Model`; each tile counts as an image."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def side(self, modality: str) -> int:
        """Side of the cells of patches that share a visual word."""
        return self.config.vision_config.hidden_stride
