"""InternVL in vLLM, in the layout of transformers: each tile, and each frame, is an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration

from foveate.core.tokens import Shape
from foveate.families import Encoder, Family
from foveate.integrations.vllm.model import FoveateModel
from foveate.integrations.vllm.processor import register_processor
from foveate.integrations.vllm.site import Site


class InternVLSite(Site):
    """Tiles of an image follow one another; frames of a video have text in between."""

    modalities = ("image", "video")
    whole_tower = True
    layers = "vision_tower.encoder.layer"
    attention = "attention"

    def modality(self, modality: str) -> str:
        """Frames are images, as in transformers."""
        return "image"

    def shapes(
        self, family: Family, modality: str, total: int, layout: Mapping[str, Any]
    ) -> list[Shape]:
        """One for each tile."""
        vision = family.config.vision_config
        height, width = (n // p for n, p in zip(vision.image_size, vision.patch_size, strict=True))
        tile = height * width // family.side("image") ** 2
        tiles = [torch.empty(tile, 1, device="meta")] * (total // tile)
        return family.shapes("image", tiles, {})

    def calls(self, modality: str, kwargs: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, or frames of each video."""
        return [int(tiles) for tiles in kwargs[f"{modality}_num_patches"]]

    def encoder(self, model: Any, family: Family) -> Encoder:
        """Queries and keys have matrices of their own here, and may have norms."""
        encoder = super().encoder(model, family)
        normed = hasattr(encoder.attention(encoder.layers[0]), "q_norm")
        names = ("q_norm", "k_norm") if normed else ("q_proj", "k_proj")
        return replace(encoder, projections=names)


class InternVL(FoveateModel, InternS1ForConditionalGeneration):
    """`InternVLForConditionalGeneration`."""

    site = InternVLSite()


register_processor(InternVL, InternVL.site)
