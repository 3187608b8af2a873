"""Cohere Compass, with windows of twelve tokens in layers that rotate, and two DeepStack planes."""

from transformers import CohereCompassConfig

from tests.conformance.zoo.mrope import PLACEHOLDERS, TEXT, rope
from tests.conformance.zoo.qwen3_vl import DEEPSTACK, Qwen3VL


class CohereCompass(Qwen3VL):
    name = "cohere_compass"

    def config(self):
        text = {
            **TEXT, "sliding_window": 12, "logit_scale": 0.5,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "rope_parameters": {"sliding_attention": rope(4, 2, 2), "full_attention": None},
        }  # fmt: skip
        return CohereCompassConfig(vision_config=DEEPSTACK, text_config=text, **PLACEHOLDERS)
