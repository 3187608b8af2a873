"""Mistral 3: a Pixtral tower on images of any shape, cells merged into tokens."""

from __future__ import annotations

from typing import Any

from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.llava import Llava
from foveate.families.towers import tower


@register_family("mistral3")
class Mistral3(Llava):
    """`Mistral3ForConditionalGeneration` and `Mistral3Model`.

    The tokens that end rows in a prompt are text.
    """

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    def projector(self, modality: str) -> Any:
        """None: the projector merges cells of patches."""
        return None

    def side(self, modality: str) -> int:
        """Side of the cells of patches that the projector merges."""
        return self.config.spatial_merge_size
