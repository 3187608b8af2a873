"""Grids of patches and plain positions: HyperCLOVA X Vision 2, EXAONE 4.5 and VideoLLaMA 3."""

import torch
from transformers import (
    Exaone4_5_Config,
    Exaone4Config,
    HyperCLOVAXConfig,
    HyperCLOVAXVisionV2Config,
    Qwen2Config,
    VideoLlama3Config,
)

from tests.conformance.zoo.mrope import VISION, MRopeMember
from tests.conformance.zoo.small import TEXT

TOKENS = {"image_token_id": 90, "video_token_id": 91}
WINDOWS = {
    **VISION, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip


class Gridded(MRopeMember):
    """Nobody asks for token types here, since positions are plain."""

    def extras(self, ids, images):
        return {"image_grid_thw": torch.tensor([self.thw] * images)} if images else {}


class HyperCLOVAX(Gridded):
    name = "hyperclovax_vision_v2"

    def config(self):
        vision = {**WINDOWS, "model_type": "qwen2_5_vl_vision"}
        return HyperCLOVAXVisionV2Config(
            vision_config=vision, text_config=HyperCLOVAXConfig(**TEXT, residual_multiplier=0.5),
            tie_word_embeddings=False, **TOKENS,
        )  # fmt: skip


class Exaone45(Gridded):
    """Windows of twelve tokens in every second layer; the others do not rotate."""

    name = "exaone4_5"

    def config(self):
        text = Exaone4Config(
            **{**TEXT, "num_hidden_layers": 6}, sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 3,
        )  # fmt: skip
        vision = {**WINDOWS, "num_key_value_heads": 2}
        return Exaone4_5_Config(vision_config=vision, text_config=text, **TOKENS)


class VideoLlama3(Gridded):
    name = "video_llama_3"
    some_logits = False
    timestamps = True
    patch = (48,)

    def config(self):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "patch_size": 4, "initializer_range": 0.15,
        }  # fmt: skip
        return VideoLlama3Config(vision_config=vision, text_config=Qwen2Config(**TEXT), **TOKENS)

    def extras(self, ids, images):
        sides = {"image_merge_sizes": torch.tensor([2] * images)} if images else {}
        return super().extras(ids, images) | sides

    def pixels(self, images, seed=0):
        """The second image is not merged."""
        sides = torch.tensor([1 if image == 1 else 2 for image in range(images)])
        return super().pixels(images, seed) | {"image_merge_sizes": sides}

    def take(self, pixels, start, stop):
        sides = pixels["image_merge_sizes"][start:stop]
        return super().take(pixels, start, stop) | {"image_merge_sizes": sides}

    def clip(self, seed=0):
        return super().clip(seed) | {"video_merge_sizes": torch.tensor([2])}
