"""ViTPose's backbone, whose MLPs may have experts for data sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.families.block import Block
from foveate.families.family import register_family
from foveate.families.plain import PlainEncoder


@dataclass(frozen=True)
class VitPoseBlock(Block):
    """A layer that is handed `dataset_index` (B), by which it chooses an expert for each image."""

    def attend(self, layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The first half of a layer: states after the attention.

        Args:
            layer: the layer.
            hidden: (B, N, D) states.
            **kwargs: what the layer is handed.
        """
        kwargs.pop("dataset_index", None)
        return super().attend(layer, hidden, **kwargs)

    def feed(self, layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The second half: states after the MLP.

        Args:
            layer: the layer.
            hidden: (B, N, D) states after the attention.
            **kwargs: what the layer is handed.
        """
        if layer.num_experts == 1:
            return super().feed(layer, hidden)
        normed = getattr(layer, self.norm2)(hidden)
        return hidden + getattr(layer, self.mlp)(normed, indices=kwargs["dataset_index"])


@register_family("vitpose_backbone")
class VitPoseBackbone(PlainEncoder):
    """`VitPoseBackbone`, and ViTPose+ with its experts."""

    layers_path = "encoder.layer"
    states_path = "encoder"
    block = VitPoseBlock(
        "layernorm_before",
        "attention",
        "layernorm_after",
        kernel="attention",
        matrices=("query", "key", "value"),
    )
    by_place = ("dataset_index",)
    class_token = False
    masks_kernels = True
