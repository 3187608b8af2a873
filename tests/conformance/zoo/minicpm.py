"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: patches of all images side by side, Qwen3.5's text model."""

import torch
from transformers import MiniCPMOcrConfig, MiniCPMV4_6Config, MiniCPMV4_7Config

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.qwen3_5 import HYBRID

TEXT = {**HYBRID, "model_type": "qwen3_5_text"}
PATCH = 4  # pixels
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": PATCH,
}  # fmt: skip


class MiniCPM(Member):
    """Images of three shapes, of which the first is that of features made by hand."""

    closed = True
    some_logits = False  # logits of all tokens, whatever is asked for
    name = "minicpmv4_6"
    kind_of_config = MiniCPMV4_6Config
    grids = ((16, 16), (8, 24), (24, 8))  # patches

    def config(self, **more):
        return self.kind_of_config(
            vision_config=VISION, text_config=TEXT, insert_layer_id=0, image_token_id=self.image_id,
            video_token_id=91, tie_word_embeddings=False, **more,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        grids = torch.tensor([self.grids[n % 3] for n in range(images)])
        generator = torch.Generator().manual_seed(seed)
        width = PATCH * int(grids.prod(1).sum())
        patches = torch.randn(1, 3, PATCH, width, generator=generator)
        return {"pixel_values": patches, "target_sizes": grids}

    def take(self, pixels, start, stop):
        widths = (PATCH * pixels["target_sizes"].prod(1)).tolist()
        images = pixels["pixel_values"].split(widths, -1)[start:stop]
        return {
            "pixel_values": torch.cat(images, -1),
            "target_sizes": pixels["target_sizes"][start:stop],
        }


class MiniCPMOcr(MiniCPM):
    closed = False
    name = "minicpm_ocr"
    kind_of_config = MiniCPMOcrConfig
    grids = ((8, 8), (4, 12), (12, 4))


class MiniCPMV47(MiniCPM):
    some_logits = True
    name = "minicpmv4_7"
    kind_of_config = MiniCPMV4_7Config

    def config(self):
        return super().config(
            image_start_id=92, image_end_id=93, slice_start_id=94, slice_end_id=95, newline_id=89
        )

    def extras(self, ids, images):
        extras = {"mm_token_type_ids": (ids == self.image_id).int()}
        if images:
            extras["target_sizes"] = torch.tensor([self.grids[0]] * images)
        return extras
