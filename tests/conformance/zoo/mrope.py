"""What the M-RoPE members share: grids, token types, and a vision tower on flattened patches."""

import torch

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "initializer_range": 0.15,
}  # fmt: skip
PLACEHOLDERS = {
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}  # fmt: skip
# Behind a cache, transformers 5.23 numbers new images of these like text, whatever they are given.
UNPLACED = (
    "cosmos3_edge", "hunyuan_vl", "minicpmv4_7", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
)  # fmt: skip


def rope(*sections, **more):
    """RoPE parameters with these numbers of frequencies for time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


class MRopeMember(Member):
    """Features are of images of 4 x 16 patches, which are 2 x 8 visual tokens."""

    thw = (1, 4, 16)
    video_id = PLACEHOLDERS["video_token_id"]
    patch: tuple[int, ...] = (96,)  # 3 channels x 2 frames x 4 x 4 pixels
    timestamps = False  # whether text stands between the frames of a video

    def extras(self, ids, images):
        extras = {"mm_token_type_ids": (ids == self.image_id).int()}
        if images:
            extras["image_grid_thw"] = torch.tensor([self.thw] * images)
        return extras

    def pixels(self, images, seed=0):
        sizes = [(1, 8, 8), (1, 4, 12), (1, 12, 4)]
        grids = torch.tensor([sizes[i % 3] for i in range(images)])
        return {"pixel_values": self.patches(grids, seed), "image_grid_thw": grids}

    def take(self, pixels, start, stop):
        grids = pixels["image_grid_thw"]
        patches = pixels["pixel_values"].split(grids.prod(1).tolist())
        return {
            "pixel_values": torch.cat(patches[start:stop]),
            "image_grid_thw": grids[start:stop],
        }

    def clip(self, seed=0):
        """A video of three frames (pairs of images) of 4 x 8 patches."""
        grid = torch.tensor([[3, 4, 8]])
        return {"pixel_values_videos": self.patches(grid, seed), "video_grid_thw": grid}

    def patches(self, grids, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(int(grids.prod(1).sum()), *self.patch, generator=generator)
