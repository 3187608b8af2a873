"""ViT and DeiT, with or without a classification head."""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.plain import VIT_BLOCK, PlainEncoder


@register_family("vit")
class ViT(PlainEncoder):
    """`ViTModel` and the models around it."""

    layers_path = "layers"
    block = VIT_BLOCK


@register_family("deit")
class DeiT(ViT):
    """`DeiTModel`; its row 1 is the distillation token."""

    @property
    def extra_tokens(self) -> int:
        """The distillation token."""
        return 1
