"""DINOv2, with or without registers."""

from __future__ import annotations

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
