"""Gemma 4: small models, whose last layers read the keys of earlier ones and whose layers have
inputs of their own, and larger ones, in which keys are values and images see themselves.
"""

from typing import ClassVar

import torch
from transformers import Gemma4Config, Gemma4UnifiedConfig

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 10000.0,
        },
    },
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
    "position_embedding_size": 32, "initializer_range": 0.15,
}  # fmt: skip
PLACEHOLDERS = {
    "image_token_id": 90, "video_token_id": 91, "audio_token_id": 92, "boi_token_id": 93,
    "eoi_token_id": 94, "boa_token_id": 95, "eoa_token_index": 95,
}  # fmt: skip


class Gemma4(Member):
    """As E2B and E4B are."""

    name = "gemma4"
    text_config: ClassVar = {**TEXT, "hidden_size_per_layer_input": 24, "num_kv_shared_layers": 4}

    def build(self, attention="sdpa"):
        """Gemma 4 leaves the scale of attention scores to the norms of queries, which learn it."""
        model = super().build(attention)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("q_norm.weight"):
                    weight.mul_(len(weight) ** -0.5)
        return model

    def config(self):
        return Gemma4Config(
            text_config=self.text_config, vision_config=VISION, audio_config=None, **PLACEHOLDERS
        )

    def extras(self, ids, images):
        return {"mm_token_type_ids": (ids == self.image_id).int()}

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])

    def pixels(self, images, seed=0):
        """Images of 4 x 4, 2 x 6 and 6 x 2 cells of 2 x 2 patches, padded to 64 patches."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.full((images, 64, 2), -1)
        for number in range(images):
            height, width = [(8, 8), (4, 12), (12, 4)][number % 3]
            grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
            places[number, : len(grid)] = grid
        values = torch.rand(images, 64, 48, generator=generator)
        return {"pixel_values": values, "image_position_ids": places}


class Gemma4Large(Gemma4):
    """As 26B-A4B is: a mixture of experts, keys that are values, images that see themselves."""

    name = "gemma4_large"
    text_config: ClassVar = {
        **TEXT, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision", "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 32,
    }  # fmt: skip


class Gemma4Unified(Gemma4):
    """As 12B is: patches without a tower, images that see themselves."""

    closed = True
    name = "gemma4_unified"
    text_config: ClassVar = {
        name: value for name, value in TEXT.items() if name != "vocab_size_per_layer_input"
    }

    def config(self):
        vision = {
            "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 32,
            "output_proj_dims": 32, "initializer_range": 0.15,
        }  # fmt: skip
        return Gemma4UnifiedConfig(
            text_config=self.text_config, vision_config=vision, audio_config=None, **PLACEHOLDERS
        )
