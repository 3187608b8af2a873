"""LLaVA-1.5 with a CLIP, a SigLIP and a Pixtral tower, and VipLLaVA."""

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PixtralVisionConfig,
    VipLlavaConfig,
)

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, SIGLIP, pictures

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "initializer_factor": 4.0,
}  # fmt: skip
PIXTRAL = PixtralVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    image_size=64, patch_size=4,
)  # fmt: skip


class Llava(Member):
    name = "llava"
    class_attention = "model.vision_tower.encoder.layers.{}.self_attn"

    def config(self):
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
            image_token_id=self.image_id, vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}


class LlavaSiglip(Llava):
    name = "llava-siglip"
    class_attention = None

    def config(self):
        return LlavaConfig(
            vision_config=SIGLIP, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip


class LlavaPixtral(Llava):
    name = "llava-pixtral"
    class_attention = None

    def config(self):
        return LlavaConfig(
            vision_config=PIXTRAL, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip

    def pixels(self, images, seed=0):
        sizes = [(24, 16), (16, 32), (12, 20)][:images]
        return {"pixel_values": pictures(images, 3, 32, 32, seed=seed), "image_sizes": sizes}


class VipLlava(Llava):
    name = "vipllava"
    stacked = True

    def config(self):
        older = hasattr(VipLlavaConfig(), "vision_feature_layers")  # before transformers 5.23
        layers = {"vision_feature_layers" if older else "vision_feature_layer": (-2, -3, 1)}
        return VipLlavaConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
            image_token_index=self.image_id, **layers,
        )  # fmt: skip
