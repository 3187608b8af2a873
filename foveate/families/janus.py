"""Janus: a ViT tower on a fixed grid, an MLP aligner, a Llama decoder, to read images with."""

from __future__ import annotations

from foveate.families.deepseek_vl import DeepseekVL
from foveate.families.family import register_family


@register_family("janus")
class Janus(DeepseekVL):
    """`JanusForConditionalGeneration` and `JanusModel`."""
