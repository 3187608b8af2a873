"""HyperCLOVA X Vision 2: Qwen2.5-VL's tower, a linear projector, plain positions."""

from __future__ import annotations

from typing import Any

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("hyperclovax_vision_v2")
class HyperCLOVAX(Gridded):
    """`HyperCLOVAXVisionV2ForConditionalGeneration` and `HyperCLOVAXVisionV2Model`."""

    tower_path = "vision_model"

    def projector(self, modality: str) -> Any:
        """A linear map, one token at a time."""
        return self.base.projector
