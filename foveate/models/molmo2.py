"""Molmo2: crops pooled by attention, tokens of all images see each other, two rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.boxes import cells
from foveate.models.family import Family, register_family


@register_family("molmo2")
class Molmo2(Family):
    """`Molmo2ForConditionalGeneration` and `Molmo2Model`."""

    placed_by = ("image_grids", "video_grids")

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Visual tokens are pooled from patches, by their attention to them."""
        return "visual tokens are pooled from patches by attention"

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Any:
        """Rotary (cos, sin), scaled for long contexts in some layers only."""
        scaled = self.text.rope_types[layer] == "scaled"
        embedding = self.text.rotary_emb if scaled else self.text.rotary_emb_unscaled
        return embedding(hidden, position_ids=position_ids)

    def shapes(
        self, modality: str, pooled: Any, arguments: Mapping[str, Any]
    ) -> list[tuple[int, tuple[int, int]]]:
        """Counts, and grids where an image is one; an overview with crops behind it is a row."""
        counts = [len(feature) for feature in pooled]
        grids = arguments.get(f"{modality}_grids")
        if grids is None:
            return super().shapes(modality, pooled, arguments)
        if modality == "video":
            sizes = [(frames * rows, columns) for frames, rows, columns in grids.tolist()]
        else:
            sizes = [(height, width) for height, width, *_ in grids.tolist()]
        return [
            (count, (h, w) if h * w == count else (1, count))
            for count, (h, w) in zip(counts, sizes[-len(counts) :], strict=True)
        ]

    def boxes(
        self, modality: str, number: int, grid: tuple[int, int], arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the overview, then those of all crops together; of a video, of each frame."""
        grids = arguments.get(f"{modality}_grids")
        if grids is None:
            return cells(*grid)
        if modality == "video":
            frames, rows, columns = grids[number].tolist()
            return cells(rows, columns).repeat(frames, 1)
        height, width, rows, columns = grids[number].tolist()
        return torch.cat((cells(height, width), cells(rows, columns)))

    def frames(
        self, modality: str, number: int, grid: tuple[int, int], arguments: Mapping[str, Any]
    ) -> int:
        """Frames of a video."""
        grids = arguments.get("video_grids") if modality == "video" else None
        return 1 if grids is None else int(grids[number][0])
