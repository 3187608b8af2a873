"""Gemma 4: sliding and full attention with a rotary base each; the small models give every layer
inputs of its own, and their last layers read the keys and values of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower


@register_family("gemma4_unified")
class Gemma4Unified(Family):
    """`Gemma4UnifiedForConditionalGeneration` and `Gemma4UnifiedModel`: no tower, but
    patches that are projected as they are, once the processor has merged them.
    """

    @property
    def unheard(self) -> str:
        """Padding, which has no placeholders."""
        return "features of audio hold padding, which the model takes out after methods have acted"

    def pixels(self, images: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """None: processors hand over patches."""
        return None

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids of pooled patches as the positions of patches give them."""
        counts = [len(feature) for feature in pooled]
        positions = arguments.get(f"{modality}_position_ids")
        if positions is None:
            return super().shapes(modality, pooled, arguments)
        side = self.side(modality)
        widths = (positions[..., 0].amax(1) // side + 1).tolist()  # of each image or frame
        frames = [1] * len(counts)
        if modality == "video":
            frames = torch.as_tensor(arguments["num_frames_per_video"]).tolist()
        shapes, first = [], 0
        for count, number in zip(counts, frames, strict=True):
            width = widths[first]
            shapes.append(Shape(count, (count // (width * number), width), number))
            first += number
        return shapes


@register_family("gemma4")
class Gemma4(Gemma4Unified):
    """`Gemma4ForConditionalGeneration` and `Gemma4Model`."""

    per_position: ClassVar[tuple[str, ...]] = ("per_layer_input",)

    @property
    def reads_embeddings(self) -> bool:
        """Whether every layer has inputs that are projected from them."""
        return bool(self.text.config.hidden_size_per_layer_input)

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; frames of a video are images to it."""
        return None if self.config.vision_config is None else tower(self, "vision_tower")

    def per_token(
        self, modality: str, rows: Any, arguments: Mapping[str, Any], newline: float = 0.0
    ) -> Sequence[Tensor]:
        """As the encoder says it of each image; of each video, its frames one after another."""
        if modality == "image":
            return list(rows)
        frames = torch.as_tensor(arguments["num_frames_per_video"]).tolist()
        ends = accumulate(frames)
        return [torch.cat(rows[e - n : e], -1) for n, e in zip(frames, ends, strict=True)]

    def side(self, modality: str) -> int:
        """Side of the cells of patches whose mean becomes a token."""
        return self.config.vision_config.pooling_kernel_size
