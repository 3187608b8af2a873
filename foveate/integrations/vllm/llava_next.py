"""LLaVA-NeXT and LLaVA-OneVision in vLLM: an image is its thumbnail, its tiles and newlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from foveate.integrations.vllm.llava import TOWER_NAMES, LlavaSite
from foveate.integrations.vllm.model import FoveateModel
from foveate.integrations.vllm.processor import register_processor


class AnyResSite(LlavaSite):
    """Images of tiles; those that are processed together are padded to equally many."""

    def arguments(self, modality: str, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        """The image's size, or the video's frames."""
        if modality == "video":
            return {"pixel_values_videos": kwargs["pixel_values_videos"][item][None]}
        return {"image_sizes": kwargs["image_sizes"][item][None]}

    def calls(self, modality: str, kwargs: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, or frames of each video."""
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        return [len(tiles) for tiles in kwargs[name]]

    def fed(self, family: Any, arguments: Mapping[str, Any], calls: int) -> int:
        """How many of an image's tiles are real."""
        if "image_sizes" not in arguments:
            return calls
        (tiles,) = family.tiles(arguments)
        return int(tiles)


class OnevisionSite(AnyResSite):
    """Videos are pooled frames and one newline."""

    modalities = ("image", "video")


class LlavaNext(FoveateModel, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration`."""

    site = AnyResSite()
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES


class LlavaOnevision(FoveateModel, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration`."""

    site = OnevisionSite()
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES


register_processor(LlavaNext, LlavaNext.site)
register_processor(LlavaOnevision, LlavaOnevision.site)
