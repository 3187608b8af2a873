"""The thinkers of Qwen2.5-Omni and Qwen3-Omni, with audio beside images."""

import torch
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerConfig,
)

from tests.conformance.zoo.mrope import VISION, MRopeMember, rope
from tests.conformance.zoo.qwen3_vl import DEEPSTACK, INTERLEAVED, Qwen3VL
from tests.conformance.zoo.small import TEXT

HEARING = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "d_model": 32, "n_window": 20, "output_dim": 64, "max_source_positions": 100,
}  # fmt: skip
START, END, AUDIO, AUDIO_START, AUDIO_END = 92, 93, 94, 88, 89
BOUNDS = {
    "vision_start_token_id": START, "vision_end_token_id": END, "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
}  # fmt: skip


class Omni(MRopeMember):
    """Images are found by the token that opens them, and no token types are asked for."""

    some_logits = False

    def image_ids(self):
        return [START, *super().image_ids(), END]

    def extras(self, ids, images):
        return {"image_grid_thw": torch.tensor([self.thw] * images)} if images else {}

    def audio(self):
        """What the audio tower eats for 40 frames, and ids of the ten tokens that it makes."""
        sound = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(1, 40, dtype=torch.long)
        ids = [AUDIO_START, *[AUDIO] * self.heard, AUDIO_END]
        return {"input_features": sound, "feature_attention_mask": mask}, ids


class Qwen25Omni(Omni):
    name = "qwen2_5_omni_thinker"
    heard = 10

    def config(self):
        vision = {
            **VISION, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        text = {**TEXT, "rope_parameters": rope(2, 3, 3)}
        return Qwen2_5OmniThinkerConfig(
            vision_config=vision, audio_config=HEARING, text_config=text, image_token_index=90,
            video_token_index=91, audio_token_index=AUDIO, **BOUNDS,
        )  # fmt: skip


class Qwen3Omni(Omni):
    name = "qwen3_omni_moe_thinker"
    heard = 5

    def config(self):
        text = {
            **INTERLEAVED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        }  # fmt: skip
        audio = {
            **HEARING, "n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 8,
        }  # fmt: skip
        return Qwen3OmniMoeThinkerConfig(
            vision_config=DEEPSTACK, audio_config=audio, text_config=text, image_token_id=90,
            video_token_id=91, audio_token_id=AUDIO, **BOUNDS,
        )  # fmt: skip

    def output(self, features):
        return Qwen3VL.output(self, features)
