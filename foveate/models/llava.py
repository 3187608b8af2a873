"""LLaVA-1.5: a CLIP or SigLIP tower on a fixed grid, an MLP projector, a Llama or Qwen2 model."""

from __future__ import annotations

from foveate.models.family import Encoder, Family, register_family
from foveate.models.plain import tower_encoder


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration` and `LlavaModel`; methods look inside their towers."""

    @property
    def encoder(self) -> Encoder | None:
        """The tower, where its patches are the visual tokens: the class token must not be one."""
        encoder = tower_encoder(self._child(self.base, "vision_tower"))
        strategy = getattr(self.config, "vision_feature_select_strategy", "default")
        takes_first_off = strategy == "default"
        if encoder is None or encoder.class_token != takes_first_off:
            return None
        return encoder
