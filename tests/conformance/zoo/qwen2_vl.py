"""Qwen2-VL and Qwen2.5-VL."""

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from tests.conformance.zoo.mrope import PLACEHOLDERS, TEXT, VISION, MRopeMember, rope


class Qwen2VL(MRopeMember):
    name = "qwen2_vl"

    def config(self):
        vision = {**VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        text = {**TEXT, "rope_parameters": rope(2, 3, 3)}
        return Qwen2VLConfig(vision_config=vision, text_config=text, **PLACEHOLDERS)


class Qwen25VL(MRopeMember):
    name = "qwen2_5_vl"

    def config(self):
        vision = {
            **VISION, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        text = {**TEXT, "rope_parameters": rope(2, 3, 3)}
        return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **PLACEHOLDERS)
