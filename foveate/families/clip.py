"""CLIP's vision encoder, alone, under a head, or beside its text encoder."""

from __future__ import annotations

from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@register_family("clip_vision_model", "clip")
class CLIPVision(PlainEncoder):
    """`CLIPVisionModel` and the models around it; the text encoder is left alone."""
