"""BEiT: a bias by relative position on the scores, of each layer or of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.families.block import Block
from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@dataclass(frozen=True)
class BeitBlock(Block):
    """A layer that adds its bias by relative position, of all patches, to the mask."""

    def attend(self, layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The first half of a layer: states after the attention.

        Args:
            layer: the layer.
            hidden: (B, N, D) states.
            **kwargs: what the layer is handed: `resolution`, (height, width) of the image, and
                `attention_mask` (1, H or 1, V + 1, V + 1) of all patches.
        """
        resize = kwargs.pop("interpolate_pos_encoding", False)
        resolution, mask = kwargs.pop("resolution", None), kwargs.pop("attention_mask", None)
        if layer.relative_position_bias is not None:
            window = tuple(side // layer.patch_size for side in resolution)
            bias = layer.relative_position_bias(window, resize, dim_size=hidden.shape[1])
            mask = bias if mask is None else bias + mask
        return super().attend(layer, hidden, attention_mask=mask, **kwargs)


@register_family("beit")
class Beit(PlainEncoder):
    """`BeitModel`, its classifiers, `BeitForSemanticSegmentation` and `BeitBackbone`.

    A merged token stands where the one stands that it was merged into.
    """

    layers_path = "layers"
    block = BeitBlock(
        "layernorm_before",
        "attention",
        "layernorm_after",
        scale1=("dropout", "lambda_1", "drop_path"),
        scale2=("dropout", "lambda_2", "drop_path"),
    )
    readers = ("pooler",)
    masks_kernels = True
    relative = True
