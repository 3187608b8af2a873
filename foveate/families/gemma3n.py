"""Gemma 3n: several streams of states for each token (AltUp), layers with inputs of their own, and
last layers that read the keys and values of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.families.family import Family, register_family
from foveate.families.timm_towers import MIXING


@register_family("gemma3n")
class Gemma3n(Family):
    """`Gemma3nForConditionalGeneration` and `Gemma3nModel`.

    States between decoder layers are (S, B, T, D). A layer predicts all streams from all, runs its
    attention and MLP on one of them, and corrects the others by what that has changed.
    """

    token_axis = 2
    per_position = ("per_layer_input",)

    @property
    def last_llm_layer(self) -> int:
        """The last layer: those that make no keys and values compute all tokens all the same."""
        return self.text_layers - 1

    @property
    def reads_embeddings(self) -> bool:
        """Streams and inputs of layers are projected from them."""
        return True

    def embedded(self, states: Tensor) -> Tensor:
        """The first stream; the others are made from it."""
        return states[:, :, 0]

    def attended(self, layer: Any, states: Tensor) -> Tensor:
        """What the layer predicts of its active stream, from (B, P, S, D)."""
        predicted: Tensor = layer.altup.predict(states.movedim(2, 0))
        return predicted[self.text.config.altup_active_idx]

    @property
    def unheard(self) -> str:
        """Padding, which has placeholders."""
        return "it pads every clip to one length, and padding would be ranked as audio"

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Convolutions and attention, of several resolutions."""
        return MIXING
