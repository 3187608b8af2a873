"""LLaVA-1.5: a CLIP tower on a fixed grid, an MLP projector, a Llama or Qwen2 text model."""

from __future__ import annotations

import math

from foveate.errors import UnsupportedModelError
from foveate.models.family import Encoder, Family, register_family


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration` and `LlavaModel` with a CLIP vision tower."""

    @property
    def encoder(self) -> Encoder:
        """The CLIP tower; its row 0 is the class token."""
        tower = self._child(self.base, "vision_tower")
        vision = self.config.vision_config
        if vision.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"LLaVA with a {vision.model_type!r} vision tower is not supported for methods "
                "that look inside the "
                "encoder; methods of the llm stage work"
            )
        return Encoder(
            layers=self._child(tower, "encoder.layers"),
            attention=lambda layer: layer.self_attn,
            heads=vision.num_attention_heads,
            class_token=True,
        )

    @property
    def feature_layer(self) -> int:
        """The layer behind `hidden_states[vision_feature_layer]`; entry 0 is the embedding."""
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            layer = layer[-1]
        return layer - 1 if layer >= 0 else self.vision_layers + layer

    def grid(self, count: int) -> tuple[int, int]:
        """The square grid of a fixed-size tower."""
        side = math.isqrt(count)
        if side * side != count:
            vision = self.config.vision_config
            raise UnsupportedModelError(
                f"an image has {count} visual tokens, which is no square grid; expected "
                f"{(vision.image_size // vision.patch_size) ** 2} without the class token "
                "(vision_feature_select_strategy='default')"
            )
        return side, side
