"""Chameleon, whose images are codes, with norms before the sublayers of a layer or after them."""

from transformers import ChameleonConfig, ChameleonVQVAEConfig

from tests.conformance.zoo.member import Member
from tests.conformance.zoo.towers import SIDE, pictures

CODES = {f"IMGIMG{chr(ord('A') + code // 10)}{chr(ord('A') + code % 10)}Z": 60 + code
         for code in range(16)}  # fmt: skip


class Chameleon(Member):
    name = "chameleon"
    stacked = True
    mixes = True
    some_logits = False  # where these are not the last of each row
    cuts_logits = True
    swin_norm = False

    def config(self):
        codes = ChameleonVQVAEConfig(
            num_embeddings=len(CODES), embed_dim=4, latent_channels=4, base_channels=32,
            channel_multiplier=[1, 1, 1, 1], num_res_blocks=1, resolution=SIDE,
        )  # fmt: skip
        return ChameleonConfig(
            vocab_size=self.vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=512, vq_config=codes,
            vocabulary_map={"<image>": self.image_id, **CODES}, swin_norm=self.swin_norm,
        )  # fmt: skip

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}

    def text(self, model):
        return model.model


class ChameleonSwin(Chameleon):
    name = "chameleon-swin"
    swin_norm = True
