"""Cosmos 3 Omni and Edge."""

from transformers import Cosmos3EdgeConfig, Cosmos3OmniConfig

from tests.conformance.zoo.mrope import PLACEHOLDERS, MRopeMember, rope
from tests.conformance.zoo.qwen3_vl import DEEPSTACK, INTERLEAVED, Qwen3VL
from tests.conformance.zoo.small import TEXT


class Cosmos3Omni(Qwen3VL):
    name = "cosmos3_omni"

    def config(self):
        text = {**INTERLEAVED, "model_type": "qwen3_vl_text"}
        vision = {**DEEPSTACK, "model_type": "qwen3_vl_vision"}
        return Cosmos3OmniConfig(vision_config=vision, text_config=text, **PLACEHOLDERS)


class Cosmos3Edge(MRopeMember):
    name = "cosmos3_edge"
    timestamps = True
    patch = (48,)

    def config(self):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "patch_size": 4, "num_patches": 64, "spatial_merge_size": 2,
        }  # fmt: skip
        text = {**TEXT, "head_dim": 16, "rope_parameters": rope(4, 2, 2)}
        return Cosmos3EdgeConfig(
            vision_config=vision, text_config=text, projector_hidden_size=64, **PLACEHOLDERS
        )
