"""Aya Vision and Command A Vision: Cohere2 text, whose full-attention layers have no positions."""

from transformers import AyaVisionConfig, Cohere2VisionConfig

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.paligemma import SIGLIP, pixels

TEXT = {
    "model_type": "cohere2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip


class AyaVision(Member):
    name = "aya_vision"
    stacked = True

    def pixels(self, images, seed=0):
        return pixels(images, seed)

    def config(self):
        return AyaVisionConfig(
            vision_config=SIGLIP, text_config=TEXT, image_token_index=self.image_id,
            vision_feature_layer=-1, downsample_factor=2,
        )  # fmt: skip


class Cohere2Vision(Member):
    name = "cohere2_vision"
    stacked = True

    def pixels(self, images, seed=0):
        return pixels(images, seed)

    def config(self):
        return Cohere2VisionConfig(
            vision_config=SIGLIP, text_config=TEXT, image_token_id=self.image_id,
            downsample_factor=2, alignment_intermediate_size=64,
        )  # fmt: skip
