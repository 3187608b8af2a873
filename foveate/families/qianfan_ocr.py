"""Qianfan-OCR: an InternViT tower with stochastic depth, pixel shuffle, a Qwen3 decoder."""

from foveate.families.family import register_family
from foveate.families.internvl import InternVL


@register_family("qianfan_ocr")
class QianfanOCR(InternVL):
    """`QianfanOCRForConditionalGeneration` and `QianfanOCRModel`."""
