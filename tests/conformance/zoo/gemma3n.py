"""Gemma 3n, with convolutions where its tower would come from timm."""

from typing import ClassVar

import torch
from transformers import AutoModel, Gemma3nConfig, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.conformance.zoo.member import Member

TEXT = {
    "vocab_size": 96, "vocab_size_per_layer_input": 88, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 6,
    "altup_num_inputs": 3, "activation_sparsity_pattern": [0.9, 0.5] + [0.0] * 6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
AUDIO = {
    "vocab_size": 4, "vocab_offset": 92, "input_feat_size": 16, "hidden_size": 16,
    "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": (4, 4),
}  # fmt: skip


class TowerConfig(Gemma3nVisionConfig):
    model_type = "gemma3n_convolutions"


class Tower(PreTrainedModel):
    """Two convolutions, which give a map (N, C, H, W) as timm's tower does."""

    config_class = TowerConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, 8, stride=8)
        self.mix = torch.nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1)
        self.post_init()

    def forward(self, pixel_values, do_pooling=False, **kwargs):
        x = torch.nn.functional.gelu(self.patches(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=self.mix(x))


AutoModel.register(TowerConfig, Tower, exist_ok=True)


class Gemma3n(Member):
    closed = True
    mixes = True
    name = "gemma3n"
    stacked = True
    text_config: ClassVar = TEXT

    def config(self):
        """Ids of images and audio have embeddings of their own, from 88 and from 92 on."""
        return Gemma3nConfig(
            text_config=self.text_config, audio_config=AUDIO,
            vision_config=TowerConfig(hidden_size=32, vocab_size=4, vocab_offset=88),
            vision_soft_tokens_per_image=self.visual, image_token_id=self.image_id,
            boi_token_id=86, eoi_token_id=88, boa_token_id=87, eoa_token_id=92, audio_token_id=93,
        )  # fmt: skip

    @torch.no_grad()
    def build(self, attention="sdpa"):
        """With streams that differ, and inputs of layers that matter: both are weak at first."""
        model = super().build(attention)
        for layer in self.text(model).layers:
            layer.altup.correct_output_scale.normal_(1.0, 0.1)
            layer.altup.modality_router.weight.mul_(20)
        return model

    def pixels(self, images, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}

    def norm(self, text):
        """Streams after the first are projected, brought to the size of the first, and averaged."""

        def joined(streams):
            first = streams[0]
            size = first.pow(2).mean(-1, keepdim=True).sqrt()
            parts = [first]
            for stream, project in zip(streams[1:], text.altup_unembed_projections, strict=True):
                part = project(stream)
                own = part.pow(2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
                parts.append(part * size / own)
            return text.norm(torch.stack(parts).mean(0))

        return joined

    def rotary(self, text, hidden, positions, layer):
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])
