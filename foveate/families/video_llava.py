"""Video-LLaVA: one tower for images and one for video frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower
from foveate.record.boxes import cells


@register_family("video_llava")
class VideoLlava(Family):
    """`VideoLlavaForConditionalGeneration` and `VideoLlavaModel`.

    The tokens of a video are those of its frames, and each frame begins with its class token. Which
    frames make a video is known from `pixel_values_videos`; without it each frame counts as a video
    of its own.
    """

    @property
    def encoder(self) -> Encoder | None:
        """The image tower; in the video tower class tokens are visual tokens."""
        strategy = self.config.vision_feature_select_strategy
        return tower(self, "image_tower") if strategy == "default" else None

    def projector(self, modality: str) -> Any:
        """An MLP, one row at a time."""
        return self.base.multi_modal_projector

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """Class tokens of video frames are visual tokens, in a tower of their own."""
        return "" if modality == "image" else "class tokens of video frames are visual tokens"

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Tokens and grid of each image, or of the frames of each video."""
        shapes = super().shapes(modality, pooled, arguments)
        pixels = arguments.get("pixel_values_videos")
        if modality == "image":
            return shapes
        frames = 1 if pixels is None else pixels.shape[1]
        return [Shape(n * frames, grid, frames) for n, grid, _ in shapes[::frames]]

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Boxes of an image, or of frames after one another; class tokens have no box."""
        if modality == "image":
            return super().boxes(modality, number, shape, arguments)
        frame = torch.cat((torch.full((1, 4), torch.nan), cells(self._side, self._side)))
        return frame.repeat(shape.frames, 1)

    @property
    def _side(self) -> int:
        return self.config.vision_config.image_size // self.config.vision_config.patch_size
