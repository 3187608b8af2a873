"""Qwen3.5 and its mixture of experts: two of three layers are recurrent."""

from transformers import Qwen3_5Config, Qwen3_5MoeConfig

from tests.conformance.zoo.mrope import PLACEHOLDERS, TEXT, VISION, MRopeMember, rope

TOWER = {
    **VISION, "out_hidden_size": 64, "intermediate_size": 48, "num_position_embeddings": 64,
}  # fmt: skip
HYBRID = {
    **TEXT, "head_dim": 16,
    "rope_parameters": rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
    "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8,
}  # fmt: skip


class Qwen35(MRopeMember):
    name = "qwen3_5"
    timestamps = True

    def config(self):
        return Qwen3_5Config(vision_config=TOWER, text_config=HYBRID, **PLACEHOLDERS)


class Qwen35Moe(Qwen35):
    name = "qwen3_5_moe"

    def config(self):
        text = {
            **HYBRID, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "num_experts": 4, "num_experts_per_tok": 2,
        }  # fmt: skip
        return Qwen3_5MoeConfig(vision_config=TOWER, text_config=text, **PLACEHOLDERS)
