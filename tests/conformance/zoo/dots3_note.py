"""Dots 3 Note, with windows, indexers that choose few keys, and layers that see all."""

from transformers import Dots3NoteConfig

from tests.conformance.zoo.gridded import Gridded

LAYERS = ["indexed_attention", "full_attention", "sliding_attention"] * 2
SLIDING = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 28,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 20, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "shared_experts_intermediate_size": 32, "index_topk": 6, "index_n_heads": 16,
    "index_head_dim": 12, "layer_types": LAYERS, "sliding_window": 12,
    "per_layer_config": {i: SLIDING for i, kind in enumerate(LAYERS) if "sliding" in kind},
    "rope_theta": 10000.0, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": 4, "adapter_in_dim": 32, "adapter_out_dim": 64, "moe_intermediate_size": 24,
    "pyramid_num_routed": [-1, 4, 4], "initializer_range": 0.15,
}  # fmt: skip
AUDIO = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "downsample_hidden_size": 16, "adapter_input_size": 32, "adapter_out_dim": 64,
}  # fmt: skip


class Dots3Note(Gridded):
    name = "dots3_note"
    patch = (48,)

    def config(self):
        return Dots3NoteConfig(
            vision_config=VISION, text_config=TEXT, audio_config=AUDIO, image_token_id=90,
            video_token_id=91, audio_token_id=94, tie_word_embeddings=False,
        )  # fmt: skip

    def build(self, attention="sdpa"):
        """Experts of the tower have configs of their own, which no setting of the model reaches;
        the counter misses grouped products.
        """
        model = super().build(attention)
        for module in model.model.vision_tower.modules():
            if hasattr(module, "gate_up_proj"):
                module.config._experts_implementation = "eager"
        return model

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])
