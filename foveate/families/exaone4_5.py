"""EXAONE 4.5: patches of any grid merged 2 x 2, plain positions, sliding and full attention.

Where layers have windows, those without do not rotate.
"""

from __future__ import annotations

from typing import Any

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("exaone4_5")
class Exaone45(Gridded):
    """`Exaone4_5_ForConditionalGeneration` and `Exaone4_5_Model`."""

    def rotates(self, layer: int) -> bool:
        """As the attention module itself decides."""
        attention: Any = self.layers[layer].self_attn
        return attention.sliding_window is None or attention.is_sliding
