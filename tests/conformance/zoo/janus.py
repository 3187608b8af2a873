"""Janus."""

from transformers import JanusConfig, JanusVisionConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.small import TEXT
from tests.conformance.zoo.towers import SIDE, pictures


class Janus(Member):
    name = "janus"
    stacked = True

    def config(self):
        vision = JanusVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=8, mlp_ratio=1.5, projection_dim=64, num_image_tokens=16,
        )  # fmt: skip
        drawing = JanusVQVAEConfig(
            embed_dim=8, num_embeddings=16, latent_channels=32, base_channels=32,
            channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=64, num_hidden_layers=1,
            image_token_embed_dim=64,
        )  # fmt: skip
        return JanusConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), vq_config=drawing,
            image_token_id=self.image_id, tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}
