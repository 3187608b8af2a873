"""Step 3.7: windows shorter than the prompt with more heads, gates, experts, and local views."""

from transformers import Step3p7Config

from tests.conformance.zoo.latents import DeepseekOCR2
from tests.conformance.zoo.llava import TEXT


class Step37(DeepseekOCR2):
    name = "step3p7"

    def config(self):
        text = {
            **TEXT, "head_dim": 16, "sliding_window": 12, "num_sliding_attention_heads": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 24,
            "rope_theta": [100.0, 10000.0] * 3, "partial_rotary_factors": [1.0, 0.5] * 3,
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "mlp_ratio": 1.5, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 64, "patch_size": 4, "max_position_embeddings": 256,
        }  # fmt: skip
        return Step3p7Config(vision_config=vision, text_config=text, image_token_id=self.image_id)

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])
