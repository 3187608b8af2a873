"""Tiny random vision encoders of every family, with attention that is not flat."""

import torch
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPSegVisionConfig,
    CLIPSegVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    MetaClip2Config,
    MetaClip2ForImageClassification,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
    MLCDVisionConfig,
    MLCDVisionModel,
    Owlv2VisionConfig,
    Owlv2VisionModel,
    OwlViTVisionConfig,
    OwlViTVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
    VivitConfig,
    VivitForVideoClassification,
    VivitModel,
)

SIDE, PATCHES, LAYERS = 6, 36, 4
SIZES = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": 48, "patch_size": 8,
}  # fmt: skip
WIDE = {**SIZES, "intermediate_size": 64}
STEEP = {**WIDE, "initializer_range": 0.2}
SOUND = {  # 4 frequencies x 9 times, of patches that overlap
    **{k: v for k, v in STEEP.items() if k != "image_size"},
    "num_mel_bins": 26, "max_length": 56, "frequency_stride": 6, "time_stride": 6,
}  # fmt: skip
VIDEO = {  # 2 frames of 3 x 6 tubelets
    **{k: v for k, v in STEEP.items() if k != "patch_size"},
    "image_size": (24, 48), "num_frames": 4, "tubelet_size": (2, 8, 8),
}  # fmt: skip
MASKED = {  # 36 of 12 x 12 patches
    **STEEP, "image_size": 96, "mask_ratio": 0.75, "decoder_hidden_size": 16,
    "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
}  # fmt: skip


def dinov3(**changes):
    return DINOv3ViTConfig(
        **STEEP, num_register_tokens=3, layerscale_value=0.7, use_gated_mlp=True, **changes
    )


def clip(kind=CLIPVisionConfig):
    return kind(**WIDE, initializer_factor=4.0)


ENCODERS = {
    "vit": lambda: ViTModel(ViTConfig(**WIDE, initializer_range=0.2)),
    "deit": lambda: DeiTModel(DeiTConfig(**WIDE, initializer_range=0.2)),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(**SIZES, mlp_ratio=2, initializer_range=0.2, layerscale_value=0.7)
    ),
    "dinov2-registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            **SIZES, mlp_ratio=2, initializer_range=0.2, num_register_tokens=3, use_swiglu_ffn=True
        )
    ),
    "clip": lambda: CLIPVisionModel(clip()),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "siglip2": lambda: Siglip2VisionModel(
        Siglip2VisionConfig(
            **{k: v for k, v in WIDE.items() if k != "image_size"}, num_patches=PATCHES
        )
    ),
    "vit_msn": lambda: ViTMSNModel(ViTMSNConfig(**STEEP)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**STEEP)),
    "ast": lambda: ASTModel(ASTConfig(**SOUND)),
    "vivit": lambda: VivitModel(VivitConfig(**VIDEO)),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**MASKED)),
    "dinov3_vit": lambda: DINOv3ViTModel(dinov3()),
    "mlcd": lambda: MLCDVisionModel(clip(MLCDVisionConfig)),
    "metaclip_2": lambda: MetaClip2VisionModel(clip(MetaClip2VisionConfig)),
    "clipseg": lambda: CLIPSegVisionModel(clip(CLIPSegVisionConfig)),
    "owlvit": lambda: OwlViTVisionModel(clip(OwlViTVisionConfig)),
    "owlv2": lambda: Owlv2VisionModel(clip(Owlv2VisionConfig)),
}
HEADS = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**WIDE, initializer_range=0.2, num_labels=5)
    ),
    "deit": lambda: DeiTForImageClassification(
        DeiTConfig(**WIDE, initializer_range=0.2, num_labels=5)
    ),
    "deit-distilled": lambda: DeiTForImageClassificationWithTeacher(
        DeiTConfig(**WIDE, initializer_range=0.2, num_labels=5)
    ),
    "dinov2": lambda: Dinov2ForImageClassification(
        Dinov2Config(
            **SIZES, mlp_ratio=2, initializer_range=0.2, layerscale_value=0.7, num_labels=5
        )
    ),
    "clip": lambda: CLIPForImageClassification(
        CLIPConfig(vision_config=clip().to_dict(), num_labels=5)
    ),
    "clip-projection": lambda: CLIPVisionModelWithProjection(clip()),
    "siglip": lambda: SiglipForImageClassification(
        SiglipConfig(vision_config=SiglipVisionConfig(**WIDE).to_dict(), num_labels=5)
    ),
    "vit_msn": lambda: ViTMSNForImageClassification(ViTMSNConfig(**STEEP, num_labels=5)),
    "ijepa": lambda: IJepaForImageClassification(IJepaConfig(**STEEP, num_labels=5)),
    "ast": lambda: ASTForAudioClassification(ASTConfig(**SOUND, num_labels=5)),
    "vivit": lambda: VivitForVideoClassification(VivitConfig(**VIDEO, num_labels=5)),
    "metaclip_2": lambda: MetaClip2ForImageClassification(
        MetaClip2Config(vision_config=clip(MetaClip2VisionConfig).to_dict(), num_labels=5)
    ),
    "metaclip_2-projection": lambda: MetaClip2VisionModelWithProjection(
        clip(MetaClip2VisionConfig)
    ),
}
SQUARE = ("vit", "deit", "dinov2", "dinov2-registers", "clip", "siglip")  # layers told nothing
SPECIAL = {
    "vit": 1, "deit": 2, "dinov2": 1, "dinov2-registers": 4, "clip": 1, "vit_msn": 1, "ast": 2,
    "vivit": 1, "vit_mae": 1, "metaclip_2": 1, "clipseg": 1, "owlvit": 1, "owlv2": 1,
    "dinov3_vit": 4, "mlcd": 1,
}  # fmt: skip

SPREAD = ("cls_token", "distillation_token", "position_embeddings", "register")


def build(table, name, attention="sdpa"):
    """A model of a table, in evaluation mode."""
    torch.manual_seed(0)
    model = table[name]().eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in SPREAD):
                parameter.normal_(std=0.5)
            if name.startswith("siglip") and any(p in key for p in ("q_proj", "k_proj")):
                parameter.mul_(3)
            if name.startswith("siglip") and "patch_embedding" in key:
                parameter.mul_(4)
    return model


def images(count=3, seed=0, name=""):
    """What a model is called with."""
    generator = torch.Generator().manual_seed(seed)
    if name == "ast":
        return {"input_values": torch.randn(count, 56, 26, generator=generator)}
    if name == "vivit":
        return {"pixel_values": torch.randn(count, 4, 3, 24, 48, generator=generator)}
    if name == "vit_mae":
        noise = torch.rand(count, 144, generator=generator)
        return {"pixel_values": torch.randn(count, 3, 96, 96, generator=generator), "noise": noise}
    pixels = torch.randn(count, 3, 48, 48, generator=generator)
    if name != "siglip2":
        return {"pixel_values": pixels}
    flat = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(count, 36, -1)
    return {
        "pixel_values": flat,
        "pixel_attention_mask": torch.ones(count, PATCHES, dtype=torch.long),
        "spatial_shapes": torch.tensor([[SIDE, SIDE]] * count),
    }


def row_of(inputs, row):
    """One image of a batch."""
    return {key: value[row : row + 1] for key, value in inputs.items()}
