"""Aria, DeepSeek-OCR 2 and Idefics2, whose visual tokens are learned queries."""

import torch
from transformers import AriaConfig, DeepseekOcr2Config, Idefics2Config, MistralConfig

from tests.conformance.zoo.idefics3 import VISION, Idefics3
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import SIDE, pictures


class Idefics2(Idefics3):
    name = "idefics2"
    mixes = True
    placed = False

    def config(self):
        reader = {
            "hidden_size": 64, "resampler_n_latents": self.visual, "resampler_depth": 1,
            "resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2,
        }  # fmt: skip
        return Idefics2Config(
            vision_config=VISION, perceiver_config=reader, image_token_id=self.image_id,
            text_config=MistralConfig(**TEXT, sliding_window=None),
        )  # fmt: skip


class Aria(Member):
    name = "aria"
    stacked = True
    mixes = True
    placed = False

    def config(self):
        text = {
            **TEXT, "model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2,
            "moe_num_shared_experts": 1, "intermediate_size": 32,
        }  # fmt: skip
        return AriaConfig(
            vision_config={**VISION, "model_type": "idefics3_vision"}, text_config=text,
            image_token_index=self.image_id, projector_patch_to_query_dict={64: self.visual},
        )  # fmt: skip

    def pixels(self, images, seed=0):
        """Tiles, the first of which is padded."""
        real = torch.ones(images, SIDE, SIDE, dtype=torch.bool)
        real[0, SIDE // 2 :] = False
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed), "pixel_mask": real}


SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1],
    "mlp_dim": 48, "downsample_channels": [24, 32], "initializer_range": 0.15,
}  # fmt: skip


class DeepseekOCR2(Member):
    name = "deepseek_ocr2"
    mixes = True
    placed = False
    crops = (2, 0, 1)  # local views of each image

    def config(self):
        encoder = {
            "vocab_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
        text = {
            **TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 32, "mlp_layer_types": ["dense", *["sparse"] * 3],
        }  # fmt: skip
        return DeepseekOcr2Config(
            vision_config={"sam_config": SAM, "encoder_config": encoder}, text_config=text,
            image_token_id=self.image_id, tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        views = pictures(images + 2 * images, 3, 64, 64, seed=seed)
        return self.views(views[:images], views[images:].split(2), range(images))

    def views(self, whole, local, numbers):
        """Arguments for the views of some images."""
        counts = [self.crops[number % 3] for number in numbers]
        crops = [part[:count] for part, count in zip(local, counts, strict=True)]
        found = {"pixel_values": whole, "num_local_patches": counts}
        return found | ({"pixel_values_local": torch.cat(crops)} if any(counts) else {})

    def take(self, pixels, start, stop):
        counts = pixels["num_local_patches"]
        found = {"pixel_values": pixels["pixel_values"][start:stop]}
        found["num_local_patches"] = counts[start:stop]
        if any(counts[start:stop]):
            crops = pixels["pixel_values_local"].split(counts)[start:stop]
            found["pixel_values_local"] = torch.cat(crops)
        return found
