"""Apertus 1.5, whose images are codes."""

import torch
from transformers import Apertus1p5Config

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import pictures

WORDS = {**TEXT, "vocab_size": 120, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
AUDIO = {
    "num_filters": 4, "upsampling_ratios": [4, 4], "hidden_size": 16, "codebook_dim": 16,
    "codebook_size": 8, "num_lstm_layers": 1,
}  # fmt: skip


class Apertus1p5(Member):
    name = "apertus1p5"
    vocabulary = 120
    mixes = True

    def config(self):
        codes = {
            "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [3],
        }  # fmt: skip
        return Apertus1p5Config(
            vision_config=codes, text_config=WORDS, audio_config=AUDIO,
            image_token_id=self.image_id, audio_token_id=91,
            image_token_offset=92, audio_token_offset=108,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        sizes = torch.tensor([(24, 32), (32, 24), (24, 24)][:images])
        return {"pixel_values": pictures(images, 3, 32, 32, seed=seed), "image_sizes": sizes}

    def build(self, attention="sdpa"):
        """Its tokenizers know one kernel alone."""
        return super().build({"text_config": attention})
