"""Nemotron-H Omni: Mamba-2, attention, experts and an MLP, one in each layer."""

import torch
from transformers import NemotronHConfig, RadioConfig
from transformers.models.nemotron_h_omni.configuration_nemotron_h_omni import (
    NemotronH_Omni_Reasoning_V3_Config,
)

from tests.conformance.zoo.llama4 import HeadWithin
from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "mamba_num_heads": 4, "mamba_head_dim": 32,
    "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 4,
    "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 40,
    "layers_block_type": [
        "linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp",
    ],
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4,
    "image_size": 32, "max_img_size": 64, "num_registers": 2, "video_temporal_patch_size": 2,
    "initializer_range": 0.15,
}  # fmt: skip
GRIDS = [(8, 8), (4, 12), (12, 4)]  # patches


class NemotronHOmni(HeadWithin, Member):
    name = "nemotron_h_omni"
    closed = True
    some_logits = False
    cuts_logits = True  # as its text model does

    def config(self):
        return NemotronH_Omni_Reasoning_V3_Config(
            vision_config=RadioConfig(**VISION), text_config=NemotronHConfig(**TEXT),
            audio_config=None, vision_hidden_size=32, projector_hidden_size=48,
            image_token_id=self.image_id, video_token_id=91,
        )  # fmt: skip

    def extras(self, ids, images):
        return {}

    def attention(self, layer):
        return layer.mixer if layer.block_type == "full_attention" else None

    def rotary(self, text, hidden, positions, layer):
        return None

    def norm(self, text):
        return text.norm_f

    def pixels(self, images, seed=0):
        generator = torch.Generator().manual_seed(seed)
        grids = torch.tensor([GRIDS[n % 3] for n in range(images)])
        patches = torch.randn(int(grids.prod(1).sum()), 48, generator=generator)
        return {"pixel_values": patches, "image_grid_hw": grids}

    def take(self, pixels, start, stop):
        grids = pixels["image_grid_hw"]
        patches = pixels["pixel_values"].split(grids.prod(1).tolist())
        return {
            "pixel_values": torch.cat(patches[start:stop]), "image_grid_hw": grids[start:stop],
        }  # fmt: skip
