"""Granite Vision 4: tiles packed as in LLaVA-NeXT, whose features enter before several layers.

Image rows of the input are zeros: several projectors, each a Q-Former over windows of patches,
make features of all tokens, and each is added before a decoder layer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.llava_next import AnyRes


@register_family("granite4_vision")
class Granite4Vision(AnyRes):
    """`Granite4VisionForConditionalGeneration` and `Granite4VisionModel`.

    Methods before the language model see the features that are added first.
    """

    @property
    def first_llm_layer(self) -> int:
        """The last layer before which features are added; that comes before removing tokens."""
        layers = [layer for _, layer in self.config.deepstack_layer_map or ()]
        return max(layers + list(self.config.spatial_target_layers))

    def marked(self, embeds: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Where the features are NaN: the embeddings are zeros."""
        visual = arguments["vision_mask"][..., 0]
        rows = next(iter(arguments["deepstack_features"].values()))[:, 0]
        return torch.zeros_like(visual).masked_scatter(visual, rows.isnan().to(visual.device))

    @property
    def encoder(self) -> Encoder | None:
        """None: a token is made of a window of patches, by attention."""
        return None

    def projector(self, modality: str) -> Any:
        """None, for the same reason."""
        return None

    def mixing(self, modality: str, arguments: Mapping[str, Any]) -> str:
        """A Q-Former reads the patches of a window together."""
        return "its projectors make tokens of windows of patches together"

    @property
    def tile_side(self) -> int:
        """Side of a tile in tokens: that of its patches, less by the rate of the projectors."""
        return int(super().tile_side * Fraction(self.config.downsample_rate))

    def packed(
        self, values: Tensor, newline: Tensor, arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(V, C) values of each image's visual tokens, by the model's own packing."""
        packed: Sequence[Tensor] = self.base.pack_image_features(
            values.split(self.tiles(arguments)),
            arguments["image_sizes"],
            self.config.vision_feature_select_strategy,
            image_newline=newline,
        )
        return packed
