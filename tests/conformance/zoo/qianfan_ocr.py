"""Qianfan-OCR."""

from transformers import QianfanOCRConfig, QianfanOCRVisionConfig, Qwen3Config

from tests.conformance.zoo.internvl import InternVL
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import SIDE


class QianfanOCR(InternVL):
    name = "qianfan_ocr"
    class_attention = "model.vision_tower.layers.{}.attention"

    def config(self):
        vision = QianfanOCRVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=(SIDE, SIDE), patch_size=(4, 4),
        )  # fmt: skip
        return QianfanOCRConfig(
            vision_config=vision, text_config=Qwen3Config(**TEXT, head_dim=16),
            image_token_id=self.image_id,
        )  # fmt: skip
