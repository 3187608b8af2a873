"""DeepSeek-VL, and its hybrid with a second tower."""

from transformers import DeepseekVLConfig, DeepseekVLHybridConfig, LlamaConfig

from tests.conformance.zoo.llava import TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT as SHORT
from tests.conformance.zoo.towers import SIDE, SIGLIP, pictures


class DeepseekVL(Member):
    name = "deepseek_vl"
    stacked = True

    def config(self):
        return DeepseekVLConfig(
            vision_config=SIGLIP, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}


class DeepseekVLHybrid(DeepseekVL):
    name = "deepseek_vl_hybrid"
    mixes = True

    def config(self):
        sam = {
            "model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 4,
            "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48, "initializer_range": 0.15,
        }  # fmt: skip
        return DeepseekVLHybridConfig(
            vision_config=SIGLIP, high_res_vision_config=sam, text_config=LlamaConfig(**SHORT),
            image_token_id=self.image_id, tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        fine = pictures(images, 3, 64, 64, seed=seed + 1)
        return {**super().pixels(images, seed), "high_res_pixel_values": fine}
