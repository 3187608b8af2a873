"""MiniMax M3 VL: full attention that rotates half of each head, a dense layer, then experts."""

from transformers import MiniMaxM3VLConfig

from tests.conformance.zoo.gridded import TOKENS, Gridded
from tests.conformance.zoo.mrope import TEXT


class MiniMaxM3VL(Gridded):
    name = "minimax_m3_vl"
    timestamps = True
    layer_types = ("full_attention",) * 6

    def config(self):
        text = {
            **TEXT, "head_dim": 16, "intermediate_size": 32, "dense_intermediate_size": 96,
            "shared_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5, "layer_types": list(self.layer_types),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "patch_size": 4, "initializer_range": 0.15,
        }  # fmt: skip
        ids = {name.replace("_id", "_index"): token for name, token in TOKENS.items()}
        return MiniMaxM3VLConfig(
            vision_config=vision, text_config=text, projector_hidden_size=48, **ids
        )
