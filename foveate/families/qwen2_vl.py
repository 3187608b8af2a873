"""Qwen2-VL and Qwen2.5-VL: patches of any grid merged 2 x 2, M-RoPE, a Qwen2 text model."""

from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("qwen2_vl", "qwen2_5_vl")
class Qwen2VL(MRope):
    """`Qwen2VLForConditionalGeneration`, `Qwen2_5_VLForConditionalGeneration` and their models."""
