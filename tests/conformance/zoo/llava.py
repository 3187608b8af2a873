"""LLaVA-1.5."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "initializer_factor": 4.0,
}  # fmt: skip


class Llava(Member):
    name = "llava"

    def config(self):
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT),
            image_token_id=self.image_id, vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )  # fmt: skip
