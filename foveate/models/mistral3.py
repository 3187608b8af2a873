"""Mistral 3: a Pixtral tower on images of any shape, cells merged into tokens."""

from __future__ import annotations

from foveate.models.family import register_family
from foveate.models.llava import Llava


@register_family("mistral3")
class Mistral3(Llava):
    """`Mistral3ForConditionalGeneration` and `Mistral3Model`.

    The tokens that end rows in a prompt are text.
    """

    patches_are_tokens = False

    @property
    def cell(self) -> int:
        """Side of a visual token in pixels."""
        return super().cell * self.config.spatial_merge_size
