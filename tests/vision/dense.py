"""Tiny random models with dense outputs around a backbone."""

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from tests.vision.encoders import SIZES, dinov3

STAGES = ["stage1", "stage2", "stage3", "stage4"]
HIDDEN = [8, 8, 8, 8]
CLASSES = 5


def dinov2(kind=Dinov2Config, **changes):
    return kind(
        **SIZES, mlp_ratio=2, initializer_range=0.2, layerscale_value=0.7, out_features=STAGES,
        **changes,
    )  # fmt: skip


def depth_anything():
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=dinov2(reshape_hidden_states=False),
            reassemble_hidden_size=32, patch_size=8, neck_hidden_sizes=HIDDEN,
            fusion_hidden_size=8, head_hidden_size=8,
        )
    )  # fmt: skip


def zoedepth():
    return ZoeDepthForDepthEstimation(
        ZoeDepthConfig(
            backbone_config=dinov2(reshape_hidden_states=False),
            neck_hidden_sizes=HIDDEN, fusion_hidden_size=8, bottleneck_features=8,
            num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1],
            bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10, "name": "nyu"}],
        )
    )  # fmt: skip


def dpt():
    return DPTForDepthEstimation(
        DPTConfig(
            backbone_config=dinov2(reshape_hidden_states=False), is_hybrid=False,
            hidden_size=32, patch_size=8, neck_hidden_sizes=HIDDEN, fusion_hidden_size=8,
            num_labels=CLASSES, use_auxiliary_head=False, use_batch_norm_in_fusion_residual=False,
        )
    )  # fmt: skip


def upernet(config=None):
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config or dinov2(), hidden_size=8, pool_scales=[1, 2],
            num_labels=CLASSES, auxiliary_channels=8, auxiliary_in_channels=32,
        )
    )  # fmt: skip


DENSE = {
    "depth_anything": depth_anything,
    "zoedepth": zoedepth,
    "dpt": dpt,
    "upernet": upernet,
    "upernet-dinov3": lambda: upernet(dinov3(out_features=STAGES)),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "cls_token" in key or "position_embeddings" in key:
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1 and key.split(".")[0] in ("neck", "head", "metric_head"):
                torch.nn.init.kaiming_normal_(parameter)  # or hardly anything comes through
    return model
