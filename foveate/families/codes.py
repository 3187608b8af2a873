"""What families share whose visual tokens are codes of a VQ-VAE, embedded like words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.families.family import Family


class Codes(Family):
    """Base of families whose image encoder is a convolutional tokenizer."""

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Codes are what a convolutional encoder says of a neighbourhood."""
        return "visual tokens are codes, made by convolutions over neighbouring patches"
