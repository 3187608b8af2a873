"""PaliGemma and PaliGemma 2: SigLIP on a fixed grid, and a Gemma text model.

The prompt is a prefix whose tokens see each other; that is in the masks, which the engine
translates.
"""

from typing import Any

from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower


@register_family("paligemma")
class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration` and `PaliGemmaModel`."""

    first_position = 1

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def projector(self, modality: str) -> Any:
        """A linear map, one row at a time."""
        return self.base.multi_modal_projector
