"""Gemma3 and ShieldGemma 2: images see themselves, windows below the prompt, two rotary bases."""

from transformers import Gemma3Config, ShieldGemma2Config

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.paligemma import SIGLIP, TEXT, pixels


class Gemma3(Member):
    name = "gemma3"
    stacked = True
    kind_of_config = Gemma3Config

    def pixels(self, images, seed=0):
        return pixels(images, seed)

    def config(self):
        text = {
            **TEXT, "sliding_window": 12, "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }  # fmt: skip
        return self.kind_of_config(
            vision_config=SIGLIP, text_config=text, image_token_index=self.image_id,
            boi_token_index=91, eoi_token_index=92, mm_tokens_per_image=self.visual,
        )  # fmt: skip

    def extras(self, ids, images):
        return {"token_type_ids": (ids == self.image_id).int()}

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])


class ShieldGemma2(Gemma3):
    name = "shieldgemma2"
    kind_of_config = ShieldGemma2Config
