"""CLIP's vision encoder, and encoders whose layers are CLIP's.

They stand alone, under a head, or beside a text encoder, which is left alone.
"""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@register_family(
    "clip_vision_model",
    "clip",
    "metaclip_2_vision_model",
    "metaclip_2",
    "clipseg_vision_model",
    "clipseg",
    "owlvit_vision_model",
    "owlvit",
    "owlv2_vision_model",
    "owlv2",
)
class CLIPVision(PlainEncoder):
    """`CLIPVisionModel` and the models around it; those of MetaCLIP 2, CLIPSeg, OWL-ViT and OWLv2.

    CLIPSeg's decoder reads hidden states, and OWL's heads all rows: both get them at full length.
    """


@register_family("mlcd_vision_model")
class MLCDVision(CLIPVision):
    """`MLCDVisionModel`; all rows have rotary positions, the class token one that is learned."""

    by_place = ("position_embeddings", "attention_mask")
    shared_rotary = True
