"""V-JEPA 2: tubelets that layers turn by their numbers, without a class token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.families.block import Block
from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@dataclass(frozen=True)
class VJEPA2Block(Block):
    """A layer that is handed more than its attention takes: `position_mask` (B, N) and whatever
    the model is called with.
    """

    def attend(self, layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The first half of a layer: states after the attention.

        Args:
            layer: the layer.
            hidden: (B, N, D) states.
            **kwargs: what the layer is handed.
        """
        return super().attend(layer, hidden, position_mask=kwargs.get("position_mask"))


@register_family("vjepa2")
class VJEPA2(PlainEncoder):
    """`VJEPA2Model` and `VJEPA2ForVideoClassification`.

    Layers compute rotary positions along time, height and width from the number of each row, and
    are told these once rows are gone. The predictor and the classifier's pooler get all rows.
    """

    layers_path = "encoder.layer"
    pixels_name = "pixel_values_videos"
    frames_name = "frames_per_clip"
    block = VJEPA2Block(
        "norm1",
        "attention",
        "norm2",
        scale1=("drop_path",),
        scale2=("drop_path",),
        matrices=("query", "key", "value"),
    )
    by_place = ("position_mask",)
    places = "position_mask"
    in_tuple = True
    whole_after_layers = True
    class_token = False
    masks_kernels = True

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """As the config says."""
        of = self.base.config
        return of.tubelet_size, of.patch_size, of.patch_size

    def _tubelets(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        """As elsewhere; the model repeats each frame where they are too few for one tubelet."""
        frames, height, width = super()._tubelets(arguments)
        return frames or arguments[self.pixels_name].shape[1], height, width
