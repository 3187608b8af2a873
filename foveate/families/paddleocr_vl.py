"""PaddleOCR-VL: patches of any grid merged 2 x 2 by the projector, M-RoPE, an Ernie text model."""

from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("paddleocr_vl")
class PaddleOCRVL(MRope):
    """`PaddleOCRVLForConditionalGeneration` and `PaddleOCRVLModel`."""
