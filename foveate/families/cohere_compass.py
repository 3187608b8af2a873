"""Cohere Compass (North Micro Vision): patches of any grid merged 2 x 2, M-RoPE, DeepStack.

Kinds of layers have rotary parameters each; those without, full attention as a rule, do not rotate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.families.family import register_family
from foveate.families.qwen3_vl import Qwen3VL


@register_family("cohere_compass")
class CohereCompass(Qwen3VL):
    """`CohereCompassForConditionalGeneration` and `CohereCompassModel`."""

    def rotates(self, layer: int) -> bool:
        """Whether the layer's kind has rotary parameters."""
        return self.text.config.rope_parameters[self.layer_kinds[layer]] is not None

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin) of layers that rotate; the others are handed none."""
        return super().rotary(hidden, position_ids, layer) if self.rotates(layer) else None
