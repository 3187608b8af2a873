"""Qwen3.5, dense and mixture of experts: Qwen's tower without DeepStack, and a text model in which
three of four layers are recurrent (gated delta net).
"""

from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("qwen3_5", "qwen3_5_moe")
class Qwen35(MRope):
    """`Qwen3_5ForConditionalGeneration`, `Qwen3_5MoeForConditionalGeneration` and their models."""

    replaces_state = True
