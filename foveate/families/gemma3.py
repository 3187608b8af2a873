"""Gemma3 and ShieldGemma 2: SigLIP pooled to a fixed grid, sliding and full attention with a rotary
base each.

Rows of an image see each other; that is in the masks, which the engine translates.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower


@register_family("gemma3")
class Gemma3(Family):
    """`Gemma3ForConditionalGeneration` and `Gemma3Model`."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def side(self, modality: str) -> int:
        """Side of the cells of patches whose mean becomes a token."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // math.isqrt(self.config.mm_tokens_per_image)


@register_family("shieldgemma2")
class ShieldGemma2(Gemma3):
    """`ShieldGemma2ForImageClassification`, and the Gemma3 within that does all but pick logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        within: Any = model if hasattr(model, "lm_head") else getattr(model, "model", model)
        super().__init__(within)
