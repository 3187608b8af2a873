"""DeepSeek-VL: a SigLIP tower on a fixed grid, an MLP aligner, a Llama text model.

The hybrid has a SAM tower for high resolution beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
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


@register_family("deepseek_vl_hybrid")
class DeepseekVLHybrid(DeepseekVL):
    """`DeepseekVLHybridForConditionalGeneration` and `DeepseekVLHybridModel`.

    What methods read of an encoder is the SigLIP tower's.
    """

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """A token is a patch of SigLIP and what SAM's convolutions make of that place."""
        return "a second tower, which ends in convolutions, has a part in every visual token"

    def projector(self, modality: str) -> Any:
        """None: the aligner is given rows of two towers."""
        return None
