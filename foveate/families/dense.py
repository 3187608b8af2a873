"""Models for depth and segmentation: a neck and a head that read the feature maps of a backbone."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.encoder import Encoder
from foveate.families.family import FAMILIES, register_family
from foveate.families.plain import PlainEncoder


@register_family("depth_anything", "zoedepth", "dpt", "upernet")
class AroundBackbone(PlainEncoder):
    """`DepthAnythingForDepthEstimation` and the like: the encoder is that of their backbone.

    The backbone's feature maps come back at full length, so that neck and head run as they are.

    Args:
        model: the model, with its `backbone`.

    Raises:
        UnsupportedModelError: there is no backbone, or it is none that methods can act inside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        backbone = getattr(model, "backbone", None)
        if backbone is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no backbone: its encoder is its own, and foveate does "
                "not know its layers yet; a DINOv2 backbone works"
            )
        kind = FAMILIES.get(backbone.config.model_type)
        if not (isinstance(kind, type) and issubclass(kind, PlainEncoder)):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads a backbone of type {backbone.config.model_type!r}, "
                "which foveate does not know yet; a DINOv2 backbone works"
            )
        self.within = kind(backbone)
        self.base = self.within.base
        self.text, self.layers, self.attention_layers = None, (), ()

    @property
    def encoder(self) -> Encoder:
        """The backbone's."""
        return self.within.encoder
