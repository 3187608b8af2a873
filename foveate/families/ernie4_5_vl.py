"""ERNIE 4.5 VL: patches of any grid, a resampler over cells of 2 x 2, M-RoPE, and experts of their
own for text and for what is seen.

The resampler merges two frames of a video, and reads an image as two frames that are equal. Which
experts a token passes is said for each position by the processor, which counts the tokens that open
and close an image among what is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core.tokens import Shape
from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("ernie4_5_vl_moe")
class Ernie45VL(MRope):
    """`Ernie4_5_VLMoeForConditionalGeneration` and `Ernie4_5_VLMoeModel`."""

    tower_path = "vision_tower"
    per_position = ("moe_mm_token_type_ids",)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids in merged patches; what counts as a frame are two of a video."""
        grids = arguments.get("video_grid_thw")
        if modality == "video" and grids is not None:
            merged = grids.clone()
            merged[:, 0] //= self.config.vision_config.temporal_merge_size
            arguments = {**arguments, "video_grid_thw": merged}
        return super().shapes(modality, pooled, arguments)
