"""Cohere Compass (North Micro Vision): patches of any grid merged 2 x 2, M-RoPE, DeepStack.

Kinds of layers have rotary parameters each; those without, full attention as a rule, do not rotate.
"""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.qwen3_vl import Qwen3VL


@register_family("cohere_compass")
class CohereCompass(Qwen3VL):
    """`CohereCompassForConditionalGeneration` and `CohereCompassModel`."""

    rotary_where_rotated = True

    def rotates(self, layer: int) -> bool:
        """Whether the layer's kind has rotary parameters."""
        return self.text.config.rope_parameters[self.layer_kinds[layer]] is not None
