"""Muse Spark and Muse Glimmer: windows of twelve tokens in layers that rotate.

Scores are scaled by less than in checkpoints, where peaked attention, heads and sublayers that are
normed after it, and weights that are random make 1e-7 of rounding 1e-4 in states. (In double
precision, with the scale of checkpoints, the distance to the oracle is 3.4e-13 at most.)
"""

from transformers import MuseGlimmerConfig, MuseSparkConfig

from tests.conformance.zoo.gridded import TOKENS, Gridded
from tests.conformance.zoo.mrope import TEXT

LAYERS = {
    **TEXT, "head_dim": 16, "sliding_window": 12, "qk_scale_factor": 2.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "layer_rope_theta": [10000.0, 0] * 3,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16,
    "layer_types": ["window_attention", "window_attention", "full_attention"],
}  # fmt: skip
PROJECTOR = {"out_hidden_size": 128, "projector_hidden_size": 48}


class Muse(Gridded):
    """Every second layer does not rotate."""

    timestamps = True

    def rotary(self, text, hidden, positions, layer):
        if not text.config.layer_rope_theta[layer]:
            return None
        return super().rotary(text, hidden, positions, layer)


class MuseGlimmer(Muse):
    name = "muse_glimmer"

    def config(self):
        return MuseGlimmerConfig(vision_config=VISION, text_config=LAYERS, **TOKENS, **PROJECTOR)


class MuseSpark(Muse):
    """A dense layer, and mixtures of experts that read narrower states."""

    name = "muse_spark"

    def config(self):
        text = {
            **LAYERS, "moe_hidden_size": 48, "moe_intermediate_size": 32, "num_local_experts": 4,
            "num_experts_per_tok": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        }  # fmt: skip
        audio = {
            "patch_sizes": [2], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1,
            "out_hidden_size": 64,
        }  # fmt: skip
        return MuseSparkConfig(
            vision_config=VISION, text_config=text, audio_config=audio, audio_token_id=92,
            **TOKENS, **PROJECTOR,
        )  # fmt: skip
