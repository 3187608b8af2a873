"""EoMT: an encoder into whose last layers queries are put, which predict masks."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.encoder import Encoder
from foveate.families.family import register_family
from foveate.families.plain import DINOV2_BLOCK, PlainEncoder


@register_family("eomt", "eomt_dinov3")
class Eomt(PlainEncoder):
    """EoMT on DINOv2 and on DINOv3; methods act before the queries are put in.

    From there on all patches are back, as the queries' masks are predicted from all of them.

    Args:
        model: the model.

    Raises:
        UnsupportedModelError: queries are put in before the first layer.
    """

    layers_path = "layers"
    block = DINOV2_BLOCK
    whole_after_layers = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if not self._alone:
            raise UnsupportedModelError(
                f"this {type(model).__name__} puts queries in before its first layer, and predicts "
                "their masks from all patches, so that none can be removed"
            )

    @property
    def _alone(self) -> int:
        """Layers in which patches are alone."""
        return max(len(self.base.layers) - self.config.num_blocks, 0)

    @property
    def encoder(self) -> Encoder:
        """The layers before the queries."""
        return replace(
            super().encoder,
            layers=self.base.layers[: self._alone],
            queries=self.config.num_queries,
        )

    @property
    def extra_tokens(self) -> int:
        """The registers."""
        return self.config.num_register_tokens

    @property
    def beyond(self) -> str:
        """Queries stand among the rows of later layers."""
        return (
            f"queries are put in before layer {self._alone} of this "
            f"{self.model_type}, whose masks are predicted from all patches, so that methods act in"
        )
