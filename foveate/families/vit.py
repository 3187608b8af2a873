"""ViT and encoders whose layers are ViT's, with or without a classification head."""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.plain import VIT_BLOCK, PlainEncoder


@register_family("vit", "vit_msn")
class ViT(PlainEncoder):
    """`ViTModel`, `ViTMSNModel` and the models around them."""

    layers_path = "layers"
    block = VIT_BLOCK


@register_family("deit")
class DeiT(ViT):
    """`DeiTModel`; its row 1 is the distillation token."""

    @property
    def extra_tokens(self) -> int:
        """The distillation token."""
        return 1


@register_family("ijepa")
class IJEPA(ViT):
    """`IJepaModel` and its classifier, which averages all rows: there is no class token."""

    class_token = False
