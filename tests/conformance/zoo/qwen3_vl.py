"""Qwen3-VL and its mixture of experts, with two DeepStack planes."""

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tests.conformance.zoo.mrope import PLACEHOLDERS, TEXT, VISION, MRopeMember, rope

DEEPSTACK = {
    **VISION, "out_hidden_size": 64, "intermediate_size": 48, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
INTERLEAVED = {**TEXT, "head_dim": 16, "rope_parameters": rope(4, 2, 2, mrope_interleaved=True)}


class Qwen3VL(MRopeMember):
    name = "qwen3_vl"
    timestamps = True

    def config(self):
        return Qwen3VLConfig(vision_config=DEEPSTACK, text_config=INTERLEAVED, **PLACEHOLDERS)

    def output(self, features):
        """Features with planes that follow from them."""
        planes = [list(features.flip(-1)), list(features.roll(1, -1))]
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(features), deepstack_features=planes
        )


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"

    def config(self):
        text = {
            **INTERLEAVED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
        }  # fmt: skip
        return Qwen3VLMoeConfig(vision_config=DEEPSTACK, text_config=text, **PLACEHOLDERS)
