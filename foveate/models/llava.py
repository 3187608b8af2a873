"""LLaVA-1.5: a CLIP tower on a fixed grid, an MLP projector, a Llama or Qwen2 text model."""

from __future__ import annotations

from foveate.models.family import Encoder, Family, register_family


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration` and `LlavaModel`; methods look inside CLIP towers."""

    @property
    def encoder(self) -> Encoder | None:
        """The CLIP tower; its row 0 is the class token, which must not be a visual token."""
        vision = self.config.vision_config
        patches_only = (
            getattr(self.config, "vision_feature_select_strategy", "default") == "default"
        )
        if vision.model_type != "clip_vision_model" or not patches_only:
            return None
        return Encoder(
            layers=self._child(self.base, "vision_tower.encoder.layers"),
            attention=lambda layer: layer.self_attn,
            heads=vision.num_attention_heads,
            class_token=True,
        )
