"""Step 3.7: local views and one of the whole image; each kind of attention has a rotary base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.families.family import Family, register_family
from foveate.record.boxes import cells


@register_family("step3p7")
class Step37(Family):
    """`Step3p7ForConditionalGeneration` and `Step3p7Model`.

    The tokens of an image are those of its local views, of which the model is not told where they
    lie, and then those of all of it.
    """

    planar = False  # views form no single grid

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """The tower ends in convolutions wider than a cell."""
        return "visual tokens are made by convolutions over neighbouring patches"

    def boxes(
        self, modality: str, number: int, shape: Shape, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the whole image, which is last; NaN for local views."""
        vision = self.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 4)  # two convolutions of stride 2
        local = shape.total - side**2
        if local < 0:  # features from elsewhere
            return torch.full((shape.total, 4), torch.nan)
        return torch.cat((torch.full((local, 4), torch.nan), cells(side, side)))
