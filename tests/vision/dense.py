"""Tiny random models with dense outputs around a backbone."""

from functools import partial

import torch
from transformers import (
    BeitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from tests.vision.encoders import SIZES, WIDE, dinov3

STAGES = ["stage1", "stage2", "stage3", "stage4"]
HIDDEN = [8, 8, 8, 8]
CLASSES = 5


def dinov2(kind=Dinov2Config, **changes):
    return kind(
        **SIZES, mlp_ratio=2, initializer_range=0.2, layerscale_value=0.7, out_features=STAGES,
        **changes,
    )  # fmt: skip


def beit(**changes):
    return BeitConfig(
        **WIDE, initializer_range=0.2, layer_scale_init_value=0.7, out_features=STAGES,
        use_relative_position_bias=True, **changes,
    )  # fmt: skip


def depth_anything():
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=dinov2(reshape_hidden_states=False),
            reassemble_hidden_size=32, patch_size=8, neck_hidden_sizes=HIDDEN,
            fusion_hidden_size=8, head_hidden_size=8,
        )
    )  # fmt: skip


def zoedepth(backbone=dinov2):
    return ZoeDepthForDepthEstimation(
        ZoeDepthConfig(
            backbone_config=backbone(reshape_hidden_states=False),
            neck_hidden_sizes=HIDDEN, fusion_hidden_size=8, bottleneck_features=8,
            num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1],
            bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10, "name": "nyu"}],
        )
    )  # fmt: skip


def dpt(backbone=dinov2):
    return DPTForDepthEstimation(
        DPTConfig(
            backbone_config=backbone(reshape_hidden_states=False), is_hybrid=False,
            hidden_size=32, patch_size=8, neck_hidden_sizes=HIDDEN, fusion_hidden_size=8,
            num_labels=CLASSES, use_auxiliary_head=False, use_batch_norm_in_fusion_residual=False,
        )
    )  # fmt: skip


def upernet(backbone=dinov2):
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone(), hidden_size=8, pool_scales=[1, 2], num_labels=CLASSES,
            auxiliary_channels=8, auxiliary_in_channels=32,
        )
    )  # fmt: skip


def dpt_own(kind=DPTForDepthEstimation):
    return kind(
        DPTConfig(
            **WIDE, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=HIDDEN,
            fusion_hidden_size=8, num_labels=CLASSES, use_auxiliary_head=False,
            initializer_range=0.2,
        )
    )  # fmt: skip


OWN = {
    "dpt-depth": dpt_own,
    "dpt-segmentation": lambda: dpt_own(DPTForSemanticSegmentation),
}
DENSE = {
    "depth_anything": depth_anything,
    "zoedepth": zoedepth,
    "dpt": dpt,
    "upernet": upernet,
    "zoedepth-beit": lambda: zoedepth(beit),
    "dpt-beit": lambda: dpt(beit),
    "upernet-beit": lambda: upernet(beit),
    "upernet-dinov3": lambda: upernet(partial(dinov3, out_features=STAGES)),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "cls_token" in key or "position_embeddings" in key:
                parameter.normal_(std=0.5)
            elif "relative_position_bias_table" in key:
                parameter.normal_(std=2.0)
            elif parameter.dim() > 1 and key.split(".")[0] in ("neck", "head", "metric_head"):
                torch.nn.init.kaiming_normal_(parameter)  # or hardly anything comes through
    return model
