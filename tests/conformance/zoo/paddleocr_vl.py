"""PaddleOCR-VL."""

from transformers import PaddleOCRVLConfig

from tests.conformance.zoo.mrope import PLACEHOLDERS, TEXT, MRopeMember, rope


class PaddleOCRVL(MRopeMember):
    name = "paddleocr_vl"
    patch = (3, 4, 4)

    def config(self):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2,
        }  # fmt: skip
        text = {**TEXT, "head_dim": 16, "rope_parameters": rope(2, 3, 3)}
        return PaddleOCRVLConfig(vision_config=vision, text_config=text, **PLACEHOLDERS)
