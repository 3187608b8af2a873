"""Qwen3-VL, dense and mixture of experts: like Qwen2-VL, with DeepStack."""

from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("qwen3_vl", "qwen3_vl_moe")
class Qwen3VL(MRope):
    """`Qwen3VLForConditionalGeneration`, `Qwen3VLMoeForConditionalGeneration` and their models."""

    @property
    def first_llm_layer(self) -> int:
        """After the last layer to whose output encoder features are added (DeepStack)."""
        return len(self.config.vision_config.deepstack_visual_indexes)
