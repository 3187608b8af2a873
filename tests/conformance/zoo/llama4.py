"""Llama 4: chunks of twelve tokens in layers that rotate, mixtures of experts in every second."""

from transformers import Llama4Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.conformance.zoo.member import Member, fresh
from tests.conformance.zoo.towers import SIDE, pictures

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 96,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 12,
    "no_rope_layers": [1, 0, 1, 0, 1, 0],
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 4, "projector_input_dim": 64, "projector_output_dim": 64,
    "vision_output_dim": 64, "initializer_range": 0.15,
}  # fmt: skip


class HeadWithin:
    """Of members whose text model brings the head, and whose model has no other within."""

    def base(self, model):
        return model

    def head(self, model):
        return model.language_model.lm_head

    def below_head(self, model):
        return model.language_model.model

    def text(self, model):
        return model.language_model.model

    def run(self, model, **inputs):
        seen = []
        hook = self.head(model).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        try:
            output = model(**inputs)
        finally:
            hook.remove()
        (output.last_hidden_state,) = seen
        return output


class Llama4(HeadWithin, Member):
    name = "llama4"
    stacked = True
    closed = True

    def config(self):
        return Llama4Config(vision_config=VISION, text_config=TEXT, image_token_index=self.image_id)

    def pixels(self, images, seed=0):
        return {"pixel_values": pictures(images, 3, SIDE, SIDE, seed=seed)}

    def output(self, features):
        """Features before the matrix that they pass on their way to the prompt."""
        return BaseModelOutputWithPooling(last_hidden_state=features)

    def stack(self, inputs):
        return inputs["mm_encoder_outputs"]["image"].last_hidden_state

    def encode(self, model, pixels, modality=None):
        rows = model.get_image_features(**fresh(pixels), return_dict=True).last_hidden_state
        return model.multi_modal_projector(rows)
