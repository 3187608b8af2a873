"""Emu3, whose images are codes with an end of every row."""

import torch
from transformers import Emu3Config

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import pictures

CODES = {f"<|visual token {code:06d}|>": 60 + code for code in range(16)}


class Emu3(Member):
    name = "emu3"
    mixes = True

    def config(self):
        codes = {
            "codebook_size": len(CODES), "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [3],
            "hidden_size": 32, "temporal_downsample_factor": 4,
        }  # fmt: skip
        words = {"<image>": self.image_id, "<|extra_200|>": 77, **CODES}
        return Emu3Config(
            vq_config=codes, text_config={**TEXT, "attention_dropout": 0.0}, vocabulary_map=words,
            tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        sizes = torch.tensor([(24, 32), (32, 24), (24, 24)][:images])
        return {"pixel_values": pictures(images, 3, 32, 32, seed=seed), "image_sizes": sizes}

    def text(self, model):
        return model.model.text_model
