"""Gemma3: SigLIP pooled to a fixed grid, sliding and full attention with a rotary base each.

Rows of an image see each other; that is in the masks, which the engine translates.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.models.family import Family, register_family


@register_family("gemma3")
class Gemma3(Family):
    """`Gemma3ForConditionalGeneration` and `Gemma3Model`."""

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin) of the layer's kind of attention."""
        return self.text.rotary_emb(hidden, position_ids, self.text.config.layer_types[layer])
