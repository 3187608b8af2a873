"""Cosmos 3: Omni, whose reader is Qwen3-VL with DeepStack, and Edge, without."""

from foveate.families.family import register_family
from foveate.families.mrope import MRope
from foveate.families.qwen3_vl import Qwen3VL


@register_family("cosmos3_omni")
class Cosmos3Omni(Qwen3VL):
    """`Cosmos3OmniForConditionalGeneration` and `Cosmos3OmniModel`."""


@register_family("cosmos3_edge")
class Cosmos3Edge(MRope):
    """`Cosmos3EdgeForConditionalGeneration` and `Cosmos3EdgeModel`."""

    places_later_images = False
