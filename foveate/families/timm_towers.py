"""Perception LM and FastVLM: towers that come from the package timm."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import Family, register_family
from foveate.record.tiles import Tiling, join

MIXING = "layers of towers from timm are of many kinds"


@register_family("perception_lm", "fast_vlm")
class TimmTower(Family):
    """`PerceptionLMForConditionalGeneration`, `FastVlmForConditionalGeneration`, and base models.

    Methods cannot look inside these towers. Videos of Perception LM, which the model
    encodes as images, are refused. Tiles of an image follow its thumbnail without text.

    Raises:
        UnsupportedModelError: timm is not installed.
    """

    thumbnail = 0

    def __init__(self, model: PreTrainedModel) -> None:
        vision = model.config.vision_config.model_type
        if vision == "timm_wrapper" and importlib.util.find_spec("timm") is None:
            raise UnsupportedModelError(
                f"the vision tower of {model.config.model_type} comes from the package timm, which "
                "is not installed; install it with `pip install timm`"
            )
        super().__init__(model)

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Layers of timm's towers differ from one to the next, and some are convolutions."""
        return MIXING

    def tilings(self, ids: Sequence[int] | None, spans: Sequence[tuple[int, int]]) -> list[Tiling]:
        """Tiles without a token in between are of one image."""
        return [Tiling(len(tiles)) for tiles in join(spans, lambda end, start: end == start)]
