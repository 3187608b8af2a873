"""LightOnOCR."""

from transformers import LightOnOcrConfig, Qwen3Config

from tests.conformance.zoo.llava import PIXTRAL
from tests.conformance.zoo.mistral3 import Mistral3
from tests.conformance.zoo.small import TEXT


class LightOnOCR(Mistral3):
    name = "lighton_ocr"

    def config(self):
        return LightOnOcrConfig(
            vision_config=PIXTRAL, text_config=Qwen3Config(**TEXT, head_dim=16),
            image_token_id=self.image_id, spatial_merge_size=2, tie_word_embeddings=False,
        )  # fmt: skip
