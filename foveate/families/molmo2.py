"""Molmo2: crops pooled by attention, tokens of all images see each other, two rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.core.transfer import upload
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower
from foveate.record.boxes import cells


@register_family("molmo2")
class Molmo2(Family):
    """`Molmo2ForConditionalGeneration` and `Molmo2Model`."""

    placed_by = ("image_grids",)

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token."""
        return tower(self, "vision_tower")

    @property
    def feature_layer(self) -> int:
        """The deepest encoder layer that the pooling reads."""
        read = self.config.adapter_config.vision_feature_layer
        return max(i if i >= 0 else self.vision_layers + i for i in read)

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """Means of the patches that a token is pooled from, of all crops."""
        patches, pooled = rows.transpose(0, 1).flatten(1), arguments[f"{modality}_token_pooling"]
        pooled = upload(pooled[(pooled >= 0).any(1)], rows.device)
        valid = (pooled >= 0).to(rows.dtype)
        means = (patches[:, pooled.clamp(min=0)] * valid).sum(-1) / valid.sum(-1)
        return means.split(self._counts(modality, arguments), -1)

    def _counts(self, modality: str, arguments: Mapping[str, Any]) -> list[int]:
        """Tokens of each image, its overview and its crops, or of each video."""
        grids = arguments[f"{modality}_grids"]
        if modality == "video":
            return grids.prod(1).tolist()
        return (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Visual tokens are pooled from patches, by their attention to them."""
        return "visual tokens are pooled from patches by attention"

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin), scaled for long contexts in some layers only."""
        scaled = self.text.rope_types[layer] == "scaled"
        embedding = self.text.rotary_emb if scaled else self.text.rotary_emb_unscaled
        return embedding(hidden, position_ids=position_ids)

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Counts, and grids where an image is one; an overview with crops after it is a row."""
        counts = [len(feature) for feature in pooled]
        grids = arguments.get(f"{modality}_grids")
        if grids is None:
            return super().shapes(modality, pooled, arguments)
        sizes = grids[-len(counts) :].tolist()
        if modality == "image":
            sizes = [(1, height, width) for height, width, *_ in sizes]
        return [
            Shape(n, (height, width), frames) if frames * height * width == n else Shape(n, (1, n))
            for n, (frames, height, width) in zip(counts, sizes, strict=True)
        ]

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the overview, then those of all crops together; of a video, of each frame."""
        grids = arguments.get("image_grids") if modality == "image" else None
        if grids is None:
            return super().boxes(modality, number, shape, arguments)
        height, width, rows, columns = grids[number].tolist()
        return torch.cat((cells(height, width), cells(rows, columns)))
