"""GOT-OCR 2.0 and PP-Chart2Table: a SAM tower, convolutions to 256 tokens, a Qwen2 decoder.

Each tile and each page counts as an image: they follow one another without text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.family import Family, register_family


@register_family("got_ocr2", "pp_chart2table")
class GotOCR2(Family):
    """`GotOcr2ForConditionalGeneration` and `GotOcr2Model`, which both types are."""

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """The tower ends in convolutions wider than a cell."""
        return "visual tokens are made by convolutions over neighbouring patches"
