"""SigLIP's and SigLIP2's vision encoders, alone, under a head, or beside their text encoders."""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@register_family("siglip_vision_model", "siglip", "siglip2_vision_model", "siglip2")
class SigLIPVision(PlainEncoder):
    """`SiglipVisionModel`, `Siglip2VisionModel` and the models around them.

    There is no class token; a head pools all rows by attention.
    """

    class_token = False
    head_path = "head"
