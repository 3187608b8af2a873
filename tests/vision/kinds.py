"""Tiny random encoders whose layers are not ViT's of today, each with an oracle of its layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForSemanticSegmentation,
    BeitModel,
    DPTConfig,
    DPTForDepthEstimation,
    DPTModel,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VitPoseBackbone,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
    YolosModel,
)

from tests.vision import oracle
from tests.vision.encoders import LAYERS, PATCHES, SIZES, WIDE

DETECTIONS, LABELS = 5, 3


@dataclass(frozen=True)
class Kind:
    """An encoder, its heads, and the oracle of its layers; it sees 36 patches in 4 layers.

    Args:
        model: makes the encoder alone.
        full: the oracle of an image.
        special: special rows, which the oracle has first.
        class_token: whether row 0 is a class token.
        heads: makes the model under a head, by a name.
        trailing: how many special rows come after the patches.
        inputs: what `count` images are, from a generator.
        only: what the encoder alone is told, so that it does nothing after its layers.
    """

    model: Callable[[], Any]
    full: type[oracle.Full]
    special: int = 0
    class_token: bool = True
    heads: Callable[[], Any] | None = None
    trailing: int = 0
    inputs: Callable[[int, torch.Generator], dict] = lambda count, generator: {
        "pixel_values": torch.randn(count, 3, 48, 48, generator=generator)
    }
    only: dict = field(default_factory=dict)


class OldLayer(oracle.Full):
    """A layer whose attention and MLP have modules of their own for what they return."""

    def project(self, layer):
        normed = layer.layernorm_before(self.x)
        return self.by_heads(layer.attention.attention, normed, ("query", "key", "value"))

    def mix(self, layer, mixed):
        return layer.attention.output.dense(mixed)

    def feed(self, layer):
        made = layer.intermediate.dense(layer.layernorm_after(self.x))
        return layer.output.dense(torch.nn.functional.gelu(made))


def _yolos():
    return YolosConfig(
        **{**WIDE, "image_size": [48, 48]}, num_detection_tokens=DETECTIONS,
        use_mid_position_embeddings=False, initializer_range=0.2, num_labels=LABELS,
    )  # fmt: skip


def _dpt():
    return DPTConfig(
        **WIDE, is_hybrid=False, initializer_range=0.2, num_labels=LABELS,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        use_auxiliary_head=False,
    )  # fmt: skip


FRAMES = 4  # of 9 patches
SMALL = {name: size for name, size in SIZES.items() if name != "image_size"}


def _videomae(pooling=True):
    return VideoMAEConfig(
        **{**WIDE, "image_size": 24}, num_frames=2 * FRAMES, initializer_range=0.2,
        num_labels=LABELS, use_mean_pooling=pooling,
    )  # fmt: skip


def _clips(count, generator):
    return {"pixel_values": torch.randn(count, 2 * FRAMES, 3, 24, 24, generator=generator)}


def _vjepa2():
    return VJEPA2Config(
        **SMALL, crop_size=24, frames_per_clip=2 * FRAMES, mlp_ratio=2, initializer_range=0.2,
        num_labels=LABELS, num_pooler_layers=1, pred_hidden_size=24, pred_num_attention_heads=4,
        pred_num_hidden_layers=2, pred_mlp_ratio=2, pred_zero_init_mask_tokens=False,
    )  # fmt: skip


def _clips_to_encode(count, generator):
    return {"pixel_values_videos": _clips(count, generator)["pixel_values"]}


class VJEPA2Layer(oracle.Full):
    """A layer that turns rows by time, height and width: of the row at which a group stands."""

    def project(self, layer):
        return self.by_heads(layer.attention, layer.norm1(self.x), ("query", "key", "value"))

    def turned(self, x):
        where = torch.arange(self.total)
        for group, stand in zip(self.groups, self.stands, strict=True):
            where[group] = stand
        axes = where // 9, where % 9 // 3, where % 3
        return self.tower.encoder.layer[0].attention.apply_rotary_embeddings(x[None], axes)[0]

    def mix(self, layer, mixed):
        return layer.attention.proj(mixed)

    def feed(self, layer):
        return layer.mlp(layer.norm2(self.x))


class BeitLayer(oracle.Full):
    """A layer with a bias by relative position: that of the row at which a group stands."""

    def project(self, layer):
        normed = layer.layernorm_before(self.x)
        return self.by_heads(layer.attention, normed, ("q_proj", "k_proj", "v_proj"))

    def bias(self, layer):
        made = [
            of((6, 6))[0]
            for of in (layer.relative_position_bias, self.tower.shared_position_bias)
            if of is not None
        ]
        where = torch.arange(self.total + 1)
        for group, stand in zip(self.groups, self.stands, strict=True):
            where[group] = stand
        return sum(made)[:, where][:, :, where]

    def mix(self, layer, mixed):
        return layer.lambda_1 * layer.attention.o_proj(mixed)

    def feed(self, layer):
        return layer.lambda_2 * layer.mlp(layer.layernorm_after(self.x))


def _beit(**changes):
    given = {"use_relative_position_bias": True, "layer_scale_init_value": 0.7, **changes}
    return BeitConfig(
        **WIDE, initializer_range=0.2, num_labels=LABELS, out_indices=[1, 2, 3, 4],
        use_auxiliary_head=False, **given,
    )  # fmt: skip


class VitPoseLayer(OldLayer):
    """The same with an MLP in one module, whose last features may come from an expert."""

    expert = 1

    def feed(self, layer):
        normed, mlp = layer.layernorm_after(self.x), layer.mlp
        hidden = torch.nn.functional.gelu(mlp.fc1(normed))
        if layer.num_experts == 1:
            return mlp.fc2(hidden)
        return torch.cat((mlp.fc2(hidden), mlp.experts[self.expert](hidden)), -1)


def _vitpose(experts=1):
    return VitPoseBackboneConfig(
        **{**SIZES, "image_size": [72, 32], "patch_size": [8, 8]}, mlp_ratio=2,
        initializer_range=0.2,
        num_experts=experts, part_features=8 if experts > 1 else 0,
    )  # fmt: skip


def _people(count, generator):
    return {"pixel_values": torch.randn(count, 3, 72, 32, generator=generator)}


def _people_of_a_dataset(count, generator):
    return {**_people(count, generator), "dataset_index": torch.full((count,), VitPoseLayer.expert)}


SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
KINDS = {
    "beit": Kind(
        lambda: BeitModel(_beit()),
        BeitLayer,
        special=1,
        heads=lambda: BeitForImageClassification(_beit()),
    ),
    "beit-shared": Kind(
        lambda: BeitModel(_beit(**SHARED, layer_scale_init_value=0.0, use_mean_pooling=False)),
        BeitLayer,
        special=1,
        heads=lambda: BeitForSemanticSegmentation(_beit(**SHARED)),
    ),
    "dpt": Kind(
        lambda: DPTModel(_dpt()), OldLayer, special=1, heads=lambda: DPTForDepthEstimation(_dpt())
    ),
    "videomae": Kind(
        lambda: VideoMAEModel(_videomae(pooling=False)),
        OldLayer,
        class_token=False,
        heads=lambda: VideoMAEForVideoClassification(_videomae()),
        inputs=_clips,
    ),
    "vitpose": Kind(
        lambda: VitPoseBackbone(_vitpose()), VitPoseLayer, class_token=False, inputs=_people
    ),
    "vitpose-experts": Kind(
        lambda: VitPoseBackbone(_vitpose(experts=3)),
        VitPoseLayer,
        class_token=False,
        inputs=_people_of_a_dataset,
    ),
    "vjepa2": Kind(
        lambda: VJEPA2Model(_vjepa2()),
        VJEPA2Layer,
        class_token=False,
        heads=lambda: VJEPA2ForVideoClassification(_vjepa2()),
        inputs=_clips_to_encode,
        only={"skip_predictor": True},
    ),
    "yolos": Kind(
        lambda: YolosModel(_yolos()),
        OldLayer,
        special=1 + DETECTIONS,
        heads=lambda: YolosForObjectDetection(_yolos()),
        trailing=DETECTIONS,
    ),
}


def build(make, attention="sdpa"):
    """A model in evaluation mode, with attention that is not flat."""
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("cls_token", "position_embeddings", "_tokens")):
                parameter.normal_(std=0.5)
            elif "relative_position_bias_table" in key:
                parameter.normal_(std=2.0)
    return model


def given(kind, count=3, seed=0):
    """What a model is called with."""
    return kind.inputs(count, torch.Generator().manual_seed(seed))


LAST, QUERIES, REGISTERS = 2, 4, 3


def _eomt(config, **sizes):
    return config(
        **{**SIZES, "num_hidden_layers": LAYERS + LAST}, num_labels=3, num_queries=QUERIES,
        num_register_tokens=REGISTERS, num_upscale_blocks=1, layerscale_value=0.7, **sizes,
    )  # fmt: skip


EOMTS = {
    "eomt": lambda blocks: EomtForUniversalSegmentation(
        _eomt(EomtConfig, num_blocks=blocks, mlp_ratio=2)
    ),
    "eomt_dinov3": lambda blocks: EomtDinov3ForUniversalSegmentation(
        _eomt(EomtDinov3Config, num_blocks=blocks, intermediate_size=64, initializer_range=0.2)
    ),
}


def eomt(attention="eager", blocks=LAST, queries_attend_to_masks=True, name="eomt"):
    torch.manual_seed(0)
    model = EOMTS[name](blocks).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("cls_token", "register_tokens")):
                parameter.normal_(std=0.5)
            elif "q_proj.weight" in key or "k_proj.weight" in key:
                parameter.mul_(3)
        if not queries_attend_to_masks:
            model.attn_mask_probs.zero_()  # as trained models have it
    return model


def vitpose(experts=3, simple=True):
    """ViTPose with a head."""
    config = VitPoseConfig(
        backbone_config=_vitpose(experts), num_labels=LABELS, use_simple_decoder=simple
    )
    return build(lambda: VitPoseForPoseEstimation(config), "eager")


def last(output):
    """The last states of an encoder or a backbone."""
    maps = output.get("feature_maps")
    return output.last_hidden_state if maps is None else maps[-1]


def first(kind, states):
    """States (..., N, D) with all special rows first."""
    leading = kind.special - kind.trailing
    parts = states.split((leading, PATCHES, kind.trailing), -2)
    return torch.cat((parts[0], parts[2], parts[1]), -2)


BUILT = {
    "eomt": eomt,
    "eomt_dinov3": lambda: eomt(name="eomt_dinov3"),
    "vitpose-head": vitpose,
}
FED = {  # with the images of which kind
    **dict.fromkeys(EOMTS, "beit"),
    "vitpose-head": "vitpose-experts",
}
