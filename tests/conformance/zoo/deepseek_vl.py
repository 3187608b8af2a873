"""DeepSeek-VL."""

from transformers import DeepseekVLConfig, LlamaConfig

from tests.conformance.zoo.llava import TEXT
from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, SIGLIP, pictures


class DeepseekVL(Member):
    name = "deepseek_vl"
    stacked = True

    def config(self):
        return DeepseekVLConfig(
            vision_config=SIGLIP, text_config=LlamaConfig(**TEXT), image_token_id=self.image_id,
            tie_word_embeddings=False,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}
