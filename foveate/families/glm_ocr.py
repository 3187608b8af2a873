"""GLM-OCR: patches of any grid merged 2 x 2, M-RoPE, a GLM text model."""

from foveate.families.family import register_family
from foveate.families.glm4v import Glm4V


@register_family("glm_ocr")
class GlmOCR(Glm4V):
    """`GlmOcrForConditionalGeneration` and `GlmOcrModel`."""
