"""PaliGemma and PaliGemma 2: a prompt that sees all of itself, and a causal continuation."""

import torch
from transformers import PaliGemmaConfig

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4,
    "vision_use_head": False,
}  # fmt: skip


def pixels(images, seed=0):
    """Random images for the tower above."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}


class PaliGemma(Member):
    name = "paligemma"
    stacked = True

    def text_config(self):
        return {**TEXT, "model_type": "gemma"}

    def pixels(self, images, seed=0):
        return pixels(images, seed)

    def config(self):
        return PaliGemmaConfig(
            vision_config={**SIGLIP, "patch_size": 8}, text_config=self.text_config(),
            image_token_index=self.image_id, projection_dim=64, hidden_size=64, vocab_size=96,
        )  # fmt: skip

    def extras(self, ids, images):
        return {"token_type_ids": torch.zeros_like(ids)}

    def continued(self, inputs, more):
        whole = super().continued(inputs, more)
        whole["token_type_ids"][:, inputs["input_ids"].shape[1] :] = 1
        return whole


class PaliGemma2(PaliGemma):
    name = "paligemma2"

    def text_config(self):
        return {
            **TEXT, "model_type": "gemma2", "sliding_window": 12, "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": None,
        }  # fmt: skip

    def build(self, attention="sdpa"):
        """Gemma 2 caps its attention logits, which only eager attention can do here."""
        return super().build("eager")
