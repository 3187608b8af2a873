"""Idefics3 and SmolVLM."""

import torch
from transformers import Idefics3Config, LlamaConfig, SmolVLMConfig

from tests.conformance.zoo.llava import TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, pictures

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 4,
}  # fmt: skip


class Idefics3(Member):
    name = "idefics3"
    kind_of_config = Idefics3Config

    def config(self):
        return self.kind_of_config(
            vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            scale_factor=2,
        )  # fmt: skip

    def text(self, model):
        return model.model.text_model

    def pixels(self, images, seed=0):
        """Tiles of one sample, padding around one of them, and an empty tile that is skipped."""
        tiles = pictures(1, images, 3, SIDE, SIDE, seed=seed)
        real = torch.ones(1, images + 1, SIDE, SIDE, dtype=torch.bool)
        real[0, 0, SIDE // 2 :] = False
        tiles[0, 0, :, SIDE // 2 :] = 0.5
        tiles = torch.cat((tiles, torch.zeros_like(tiles[:, :1])), 1)
        return {"pixel_values": tiles, "pixel_attention_mask": real}

    def take(self, pixels, start, stop):
        return {name: value[:, start:stop] for name, value in pixels.items()}

    def batch(self, pixels, images):
        """Every sample has the tiles of the longest; those it lacks are empty."""
        rows = {name: [] for name in pixels}
        for row, count in enumerate(images):
            start = sum(images[:row])
            for name, value in pixels.items():
                empty = torch.zeros_like(value[0, : max(images) - count])
                rows[name].append(torch.cat((value[0, start : start + count], empty)))
        return {name: torch.stack(row) for name, row in rows.items()}

    def counts(self, model, pixels):
        return [self.visual] * (pixels["pixel_values"].shape[1] - 1)


class SmolVLM(Idefics3):
    name = "smolvlm"
    kind_of_config = SmolVLMConfig
