"""Unlimited-OCR, whose layers see the first prompt and a window after it. Here all lies within the
window, so that causal attention is an oracle; tests/families/test_unlimited_ocr.py looks beyond it.
"""

from transformers import UnlimitedOcrConfig

from tests.conformance.zoo.latents import SAM, DeepseekOCR2
from tests.conformance.zoo.small import TEXT


class UnlimitedOCR(DeepseekOCR2):
    name = "unlimited_ocr"
    window = 64

    def config(self):
        encoder = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
        }  # fmt: skip
        text = {
            **TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 32, "mlp_layer_types": ["dense", *["sparse"] * 3],
            "sliding_window": self.window, "num_key_value_heads": 4,
        }  # fmt: skip
        return UnlimitedOcrConfig(
            vision_config={"sam_config": SAM, "encoder_config": encoder}, text_config=text,
            image_token_id=self.image_id, tie_word_embeddings=False,
        )  # fmt: skip

    def views(self, whole, local, numbers):
        found = super().views(whole, local, numbers)
        return found | {"patches_grid": [[max(n, 1), 1] for n in found["num_local_patches"]]}

    def take(self, pixels, start, stop):
        grids = pixels["patches_grid"][start:stop]
        return super().take(pixels, start, stop) | {"patches_grid": grids}
