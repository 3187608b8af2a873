"""LLaVA-1.5 in vLLM, with CLIP's or SigLIP's tower."""

from __future__ import annotations

import re
from typing import Any

from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper

from foveate.errors import UnsupportedModelError
from foveate.integrations.vllm.model import FoveateModel
from foveate.integrations.vllm.processor import register_processor
from foveate.integrations.vllm.site import Site

TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
    }
)
"""Weights of the tower as transformers 5 saves them; vLLM 0.32 knows the older names alone."""


class LlavaSite(Site):
    """LLaVA-1.5: an image is a row of the tower."""

    def check(self, config: Any) -> None:
        """Refuse Pixtral's tower."""
        if config.vision_config.model_type == "pixtral":
            raise UnsupportedModelError(
                "with Pixtral's tower, a break token follows each row of an image in the prompt, "
                "and vLLM asks where placeholders are before it encodes the image; foveate serves "
                "LLaVA with CLIP's and SigLIP's towers in vLLM"
            )


class Llava(FoveateModel, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration`."""

    site = LlavaSite()
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES


register_processor(Llava, Llava.site)
