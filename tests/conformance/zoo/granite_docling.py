"""Granite Docling, on the coarse route."""

import torch
from transformers import GraniteDoclingConfig
from transformers.models.granite_docling.modeling_granite_docling import (
    GraniteDoclingImageFeaturesOutput,
)

from tests.conformance.zoo.idefics3 import VISION, Idefics3
from tests.conformance.zoo.small import TEXT


class GraniteDocling(Idefics3):
    name = "granite_docling"

    def config(self):
        vision = {
            **VISION, "out_hidden_size": 64, "scale_factor": 2, "deepstack_visual_indexes": [0, 2],
        }  # fmt: skip
        text = {
            **TEXT, "num_hidden_layers": 6, "embedding_multiplier": 2.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5, "attention_multiplier": 0.25,
        }  # fmt: skip
        return GraniteDoclingConfig(
            vision_config=vision, text_config=text, image_token_id=self.image_id, pad_token_id=0,
            tie_word_embeddings=False,
        )  # fmt: skip

    def output(self, features):
        planes = [list(features.flip(-1)), list(features.roll(1, -1))]
        return GraniteDoclingImageFeaturesOutput(
            pooler_output=list(features), deepstack_features=planes
        )

    def pixels(self, images, seed=0):
        """Tiles of one sample, and an empty one that is left out."""
        tiles = super().pixels(images, seed)["pixel_values"]
        real = torch.ones(1, images + 1, dtype=torch.bool)
        real[0, -1] = False
        return {"pixel_values": tiles, "pixel_attention_mask": real}
