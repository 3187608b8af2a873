"""Molmo2, with norms before or after its sublayers and two kinds of query and key norms."""

import torch
from transformers import Molmo2Config

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "additional_vocab_size": 4, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "rope_scaling_layers": [0, 2, 3],
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "image_size": [32, 32], "patch_size": 4,
}  # fmt: skip
ADAPTER = {
    "vision_feature_layer": [2, 0], "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48, "text_hidden_size": 64,
}  # fmt: skip


class Molmo2(Member):
    name = "molmo2"
    timestamps = True
    video_id = Member.image_id

    def text_config(self):
        return TEXT

    def config(self):
        return Molmo2Config(
            vision_config=VISION, adapter_config=ADAPTER, text_config=self.text_config(),
            image_patch_id=self.image_id,
        )  # fmt: skip

    def extras(self, ids, images):
        return {"mm_token_type_ids": (ids == self.image_id).int()}

    def pixels(self, images, seed=0):
        """Overviews of 8 x 8 patches in cells of four; every second image has a crop after it."""
        generator = torch.Generator().manual_seed(seed)
        grids = torch.tensor([[4, 4, 4 * (i % 2), 4 * (i % 2)] for i in range(images)])
        return self.cells(torch.randn(len(grids) + images // 2, 64, 48, generator=generator), grids)

    def cells(self, crops, grids):
        """Arguments for (N, 64, 48) crops, and which patches each token pools."""
        cell = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        pooling = torch.cat([cell + 64 * crop for crop in range(len(crops))])
        return {"pixel_values": crops, "image_token_pooling": pooling, "image_grids": grids}

    def take(self, pixels, start, stop):
        grids = pixels["image_grids"]
        crops = pixels["pixel_values"].split((1 + (grids[:, 2] > 0).long()).tolist())
        return self.cells(torch.cat(crops[start:stop]), grids[start:stop])

    def clip(self, seed=0):
        """Three frames of 4 x 4 visual tokens."""
        frames = self.pixels(3, seed)
        return {
            "pixel_values_videos": frames["pixel_values"][:3],
            "video_token_pooling": frames["image_token_pooling"][:48],
            "video_grids": torch.tensor([[3, 4, 4]]),
        }

    def rotary(self, text, hidden, positions, layer):
        unscaled = text.rope_types[layer] == "unscaled"
        return (text.rotary_emb_unscaled if unscaled else text.rotary_emb)(hidden, positions)


class Molmo2O(Molmo2):
    name = "molmo2-o"

    def text_config(self):
        return {**TEXT, "qk_norm_type": "olmo", "norm_after": True}
