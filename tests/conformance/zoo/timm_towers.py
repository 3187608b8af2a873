"""Perception LM and FastVLM, with a CLIP tower where theirs would come from timm."""

from transformers import (
    CLIPVisionConfig,
    FastVlmConfig,
    LlamaConfig,
    PerceptionLMConfig,
    Qwen2Config,
)

from tests.conformance.zoo.llava import CLIP, TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, pictures


class PerceptionLM(Member):
    name = "perception_lm"
    stacked = True

    def config(self):
        vision = CLIPVisionConfig(**{**CLIP, "patch_size": 4})
        vision.model_args = {"embed_dim": vision.hidden_size}
        return PerceptionLMConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            video_token_id=self.image_id + 1, projector_pooling_ratio=2,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        """Tiles of one image."""
        return {"pixel_values": pictures(1, images, 3, SIDE, SIDE, seed=seed)}

    def take(self, pixels, start, stop):
        return {"pixel_values": pixels["pixel_values"][:, start:stop]}


class FastVlm(Member):
    name = "fast_vlm"
    stacked = True

    def config(self):
        return FastVlmConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=Qwen2Config(**TEXT),
            image_token_index=self.image_id,
        )  # fmt: skip
