"""DINOv2, with or without registers, and DINOv3's vision transformers."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.families.family import register_family
from foveate.families.plain import DINOV2_BLOCK, PlainEncoder


@register_family("dinov2", "dinov2_with_registers")
class DINOv2(PlainEncoder):
    """`Dinov2Model`, `Dinov2WithRegistersModel`, their classifiers and backbones."""

    layers_path = "encoder.layer"
    states_path = "encoder"
    block = DINOV2_BLOCK

    @property
    def extra_tokens(self) -> int:
        """The registers."""
        return getattr(self.base.config, "num_register_tokens", 0)


@register_family("dinov3_vit")
class DINOv3(DINOv2):
    """`DINOv3ViTModel` and its backbone; rotary positions turn patches, but not the rows before."""

    layers_path = "model.layer"
    states_path = "model"
    states_apart = True

    @classmethod
    def _under_heads(cls, model: PreTrainedModel) -> PreTrainedModel:
        """The model itself: there are no heads, and its `model` are the layers."""
        return model
