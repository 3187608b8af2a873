"""Tiny vision towers that several members share."""

from typing import Any

import torch
from transformers import SiglipVisionConfig

SIDE = 32  # pixels
SIGLIP = SiglipVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    image_size=SIDE, patch_size=8, vision_use_head=False,
)  # fmt: skip


def pictures(*shape: int, seed: int = 0) -> Any:
    """Random pixels that are smooth enough for patches to differ a lot."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:-2], shape[-2] // 8, shape[-1] // 8, generator=generator) * 2
    fine = torch.randn(*shape, generator=generator)
    return fine + coarse.repeat_interleave(8, -2).repeat_interleave(8, -1)
