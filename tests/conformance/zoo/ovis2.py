"""Ovis2."""

import torch
from transformers import Ovis2Config, Qwen2Config
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

from tests.conformance.zoo.llava import TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, pictures


class Ovis2(Member):
    name = "ovis2"
    stacked = True

    def config(self):
        vision = Ovis2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=SIDE, patch_size=4, vocab_size=40, hidden_stride=2,
            num_visual_indicator_tokens=5,
        )  # fmt: skip
        return Ovis2Config(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=self.image_id,
            visual_indicator_token_ids=[85, 86, 87, 88, 89], vocab_size=96, hidden_size=64,
            tie_word_embeddings=False,
        )  # fmt: skip

    def image_ids(self):
        return [85, *super().image_ids(), 86]

    def output(self, features):
        generator = torch.Generator().manual_seed(7)
        indicators = torch.randn(5, features.shape[-1], generator=generator)
        return BaseModelOutputWithVisualIndicatorFeatures(
            pooler_output=features, visual_indicator_features=indicators
        )

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}
