"""LLaVA-1.5: a CLIP or SigLIP tower on a fixed grid, an MLP projector, a Llama or Qwen2 model."""

from __future__ import annotations

import math

from foveate.errors import UnsupportedModelError
from foveate.models.family import Encoder, Family, register_family
from foveate.models.plain import tower_encoder


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration` and `LlavaModel` with a CLIP or SigLIP vision tower."""

    @property
    def encoder(self) -> Encoder:
        """The tower; the class token of a CLIP tower is no visual token."""
        encoder = tower_encoder(self._child(self.base, "vision_tower"))
        strategy = self.config.vision_feature_select_strategy
        fitting = "default" if encoder.class_token else "full"
        if strategy != fitting:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} "
                + (
                    "makes the class token a visual token"
                    if encoder.class_token
                    else "takes off the first patch, because this tower has no class token"
                )
                + ", which methods that look inside the encoder do not support; "
                f"use {fitting!r}"
            )
        return encoder

    @property
    def feature_layer(self) -> int:
        """The layer behind `hidden_states[vision_feature_layer]`; entry 0 is the embedding."""
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            layer = layer[-1]
        return layer - 1 if layer >= 0 else self.vision_layers + layer

    def grid(self, count: int) -> tuple[int, int]:
        """The square grid of a fixed-size tower; features of another shape count as one row."""
        side = math.isqrt(count)
        return (side, side) if side * side == count else (1, count)
