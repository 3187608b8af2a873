"""Dots 3 Note: patches of any grid merged 2 x 2, latent attention (MLA) to a window or to the keys
that an indexer chooses (DSA).

The cache holds a key of every slot for the indexer, which is shortened with the slots. What it
chooses are slots of the keys that a layer sees, so that it chooses among the survivors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("dots3_note")
class Dots3Note(Gridded):
    """`Dots3NoteForConditionalGeneration` and `Dots3NoteModel`; audio tokens count as text.

    No layer of the published model sees the whole sequence, so that none can rank tokens by its
    attention.
    """

    tower_path = "vision_tower"

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin) of a decoder layer, of 32 bits in those with an indexer."""
        if self.layer_kinds[layer] == "indexed_attention":
            hidden = hidden.float()
        return super().rotary(hidden, position_ids, layer)
