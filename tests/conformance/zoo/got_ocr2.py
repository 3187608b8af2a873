"""GOT-OCR 2.0 and PP-Chart2Table, whose SAM tower ends in convolutions."""

from transformers import GotOcr2Config, PPChart2TableConfig, Qwen2Config

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import pictures

VISION = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48,
    "initializer_range": 0.15,
}  # fmt: skip


class GotOCR2(Member):
    name = "got_ocr2"
    stacked = True
    mixes = True
    kind_of_config = GotOcr2Config

    def config(self):
        return self.kind_of_config(
            vision_config=VISION, text_config=Qwen2Config(**TEXT), image_token_index=self.image_id,
            tie_word_embeddings=False,
        )  # fmt: skip

    def build(self, attention="sdpa"):
        """The tower has an attention of its own; only the decoder's can be chosen."""
        return super().build({"": "eager", "vision_config": "eager", "text_config": attention})

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, 64, 64, seed=seed)}


class PPChart2Table(GotOCR2):
    name = "pp_chart2table"
    kind_of_config = PPChart2TableConfig
