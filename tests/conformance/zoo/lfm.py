"""LFM2-VL and LFM3-VL: convolutions between attention layers."""

import torch
from transformers import Lfm2VlConfig, Lfm3VlConfig

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.mrope import PLACEHOLDERS, MRopeMember

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NAFLEX = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": 4, "num_patches": 64, "vision_use_head": False,
}  # fmt: skip
GRIDS = [(8, 8), (4, 12), (12, 4)]  # patches


class Lfm2VL(Member):
    name = "lfm2_vl"

    def config(self):
        text = {
            **TEXT, "model_type": "lfm2", "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv"] * 2,
        }  # fmt: skip
        return Lfm2VlConfig(
            vision_config={**NAFLEX, "model_type": "siglip2_vision_model"}, text_config=text,
            image_token_id=self.image_id, projector_hidden_size=48, downsample_factor=2,
        )  # fmt: skip

    def norm(self, text):
        return text.embedding_norm

    def pixels(self, images, seed=0):
        """Patches of images of three shapes, padded to the longest of all shapes."""
        generator = torch.Generator().manual_seed(seed)
        grids = torch.tensor([GRIDS[n % 3] for n in range(images)])
        patches = torch.randn(images, 64, 48, generator=generator)
        real = torch.arange(64) < grids.prod(1)[:, None]
        return {
            "pixel_values": patches * real[..., None], "spatial_shapes": grids,
            "pixel_attention_mask": real.int(),
        }  # fmt: skip


class Lfm3VL(MRopeMember):
    closed = True
    name = "lfm3_vl"
    timestamps = True

    def config(self):
        text = {
            **TEXT, "model_type": "lfm3", "head_dim": 16, "conv_L_cache": 5, "sliding_window": 12,
            "layer_types": ["conv", "full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "proportional", "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            },
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "patch_size": 4,
            "layer_types": ["conv", "full_attention", "full_attention"],
            "initializer_range": 0.15,
        }  # fmt: skip
        return Lfm3VlConfig(
            vision_config=vision, text_config=text, projector_hidden_size=48, **PLACEHOLDERS
        )

    def extras(self, ids, images):
        return {name: of for name, of in super().extras(ids, images).items() if "grid" in name}

    def norm(self, text):
        return text.embedding_norm

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])
