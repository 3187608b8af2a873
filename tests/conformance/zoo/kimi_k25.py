"""Kimi K2.5: latent attention, dense layers before those with experts, patches merged 2 x 2."""

from typing import Any, ClassVar

import torch
from transformers import DeepseekV3Config, Kimi_K25Config

from tests.conformance.zoo.mrope import PLACEHOLDERS, MRopeMember

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4,
}  # fmt: skip


class KimiK25(MRopeMember):
    """Grids as where positions are of M-RoPE; these are single numbers."""

    name = "kimi_k25"
    patch = (3, 4, 4)
    text_config: ClassVar[dict[str, Any]] = TEXT

    def config(self):
        return Kimi_K25Config(
            vision_config=VISION, text_config=DeepseekV3Config(**self.text_config),
            projection_hidden_size=32, tie_word_embeddings=False, **PLACEHOLDERS,
        )  # fmt: skip

    def extras(self, ids, images):
        return {"image_grid_thw": torch.tensor([self.thw] * images)} if images else {}


class KimiK25Halves(KimiK25):
    """Queries that are not made of latents, and rotary positions that pair halves."""

    name = "kimi_k25-halves"
    text_config: ClassVar[dict[str, Any]] = {**TEXT, "q_lora_rank": None, "rope_interleave": False}
