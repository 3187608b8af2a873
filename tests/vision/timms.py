"""Tiny random ViTs of timm, and the oracle of their layers. Import only where timm is installed."""

import torch
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from tests.vision import oracle
from tests.vision.encoders import LAYERS

SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": LAYERS, "num_heads": 4}
MAPPED = {"class_token": False, "global_pool": "map"}
VITS = {  # arguments, and rows before the patches
    "plain": ({}, 1),
    "registers": (
        {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.7, "pre_norm": True}, 4,
    ),
    "average": ({"class_token": False, "global_pool": "avg"}, 0),
    "mapped": (MAPPED, 0),
    "distilled": ({}, 2),
    "gated": ({"attn_layer": "attn", "scale_attn_norm": True, "qkv_bias": False}, 1),
}  # fmt: skip


def make(name="plain", head=False, architecture=None, **changes):
    """A model in evaluation mode, with attention that is not flat."""
    torch.manual_seed(0)
    found = {"distilled": "deit_tiny_distilled_patch16_224"}.get(name, "vit_tiny_patch16_224")
    config = TimmWrapperConfig(
        architecture=architecture or found,
        model_args=changes if architecture else {**SIZES, **VITS[name][0], **changes},
        num_labels=5,
    )
    model = (TimmWrapperForImageClassification if head else TimmWrapperModel)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("_token", "pos_embed")):
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


class TimmLayer(oracle.Full):
    """A layer whose queries, keys and values one matrix makes."""

    def _layers(self):
        return self.tower.timm_model.blocks

    def project(self, layer):
        made = layer.attn.qkv(layer.norm1(self.x)).unflatten(-1, (3, 4, -1))
        return made.permute(1, 2, 0, 3).unbind()

    def mix(self, layer, mixed):
        return layer.ls1(layer.attn.proj(layer.attn.norm(mixed)))

    def feed(self, layer):
        return layer.ls2(layer.mlp(layer.norm2(self.x)))


def embedded(model, inputs):
    """(B, N, D) input of layer 0, and what the model returns."""
    seen = []
    hook = model.timm_model.blocks[0].register_forward_pre_hook(
        lambda layer, args: seen.append(args[0])
    )
    try:
        return model(**inputs, output_hidden_states=True), seen[0]
    finally:
        hook.remove()
