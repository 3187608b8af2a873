"""Tiny random models whose encoder stands beside one of text: masks, boxes, likeness."""

import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegTextConfig,
    CLIPSegVisionConfig,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2TextConfig,
    MetaClip2VisionConfig,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2TextConfig,
    Owlv2VisionConfig,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTTextConfig,
    OwlViTVisionConfig,
)

from tests.vision.encoders import clip

TEXT = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def both(kind, text, vision, **changes):
    """The config of a model with two encoders."""
    return kind(
        text_config=text(**TEXT).to_dict(), vision_config=clip(vision).to_dict(),
        projection_dim=32, initializer_factor=4.0, **changes,
    )  # fmt: skip


def clipseg():
    config = both(
        CLIPSegConfig, CLIPSegTextConfig, CLIPSegVisionConfig, extract_layers=[0, 1, 3],
        reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=32,
    )  # fmt: skip
    return CLIPSegForImageSegmentation(config)


def metaclip_2():
    return MetaClip2Model(both(MetaClip2Config, MetaClip2TextConfig, MetaClip2VisionConfig))


def owlvit():
    return OwlViTForObjectDetection(both(OwlViTConfig, OwlViTTextConfig, OwlViTVisionConfig))


def owlv2():
    return Owlv2ForObjectDetection(both(Owlv2Config, Owlv2TextConfig, Owlv2VisionConfig))


MODELS = {"clipseg": clipseg, "metaclip_2": metaclip_2, "owlvit": owlvit, "owlv2": owlv2}


def words(count):
    """A prompt for each of some images."""
    ids = torch.randint(3, 32, (count, 6), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    return model
