"""DeepSeek-VL: a SigLIP tower on a fixed grid, an MLP aligner, a Llama text model."""

from __future__ import annotations

from typing import Any

from foveate.families.family import Encoder, Family, register_family
from foveate.families.towers import tower


@register_family("deepseek_vl")
class DeepseekVL(Family):
    """`DeepseekVLForConditionalGeneration` and `DeepseekVLModel`."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_model")

    def projector(self, modality: str) -> Any:
        """An MLP, one row at a time."""
        return self.base.aligner
