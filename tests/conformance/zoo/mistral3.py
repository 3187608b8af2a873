"""Mistral 3."""

import torch
from transformers import Mistral3Config, MistralConfig

from tests.conformance.zoo.llava import PIXTRAL, TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import pictures


class Mistral3(Member):
    name = "mistral3"

    def config(self):
        return Mistral3Config(
            vision_config=PIXTRAL, text_config=MistralConfig(**TEXT, sliding_window=None),
            image_token_index=self.image_id, spatial_merge_size=2,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        sizes = torch.tensor([(40, 24), (32, 48), (16, 40)][:images])
        return {"pixel_values": pictures(images, 3, 48, 48, seed=seed), "image_sizes": sizes}
