"""VideoLLaMA 3: patches of any grid, interpolated in cells whose side is said for each image, and a
Qwen2 decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("video_llama_3")
class VideoLlama3(Gridded):
    """`VideoLlama3ForConditionalGeneration` and `VideoLlama3Model`."""

    tower_path = "vision_model"

    def side(self, modality: str) -> int:
        """One, where nothing else is said."""
        return 1

    def sides(self, modality: str, images: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        """As the processor says."""
        given = arguments.get(f"{modality}_merge_sizes")
        if given is None:
            return super().sides(modality, images, arguments)
        return given[-images:].tolist()

    def projector(self, modality: str) -> Any:
        """An MLP, one token at a time."""
        return self.base.projector
