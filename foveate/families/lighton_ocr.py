"""LightOnOCR: a Pixtral tower on pages of any shape, cells merged into tokens, a Qwen3 decoder."""

from __future__ import annotations

from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.mistral3 import Mistral3
from foveate.families.towers import tower


@register_family("lighton_ocr")
class LightOnOCR(Mistral3):
    """`LightOnOcrForConditionalGeneration` and `LightOnOcrModel`."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_encoder")
