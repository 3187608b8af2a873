"""Models for depth, segmentation and poses: necks and heads that read maps of a backbone."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.encoder import Encoder
from foveate.families.family import FAMILIES, register_family
from foveate.families.plain import OLD_BLOCK, PlainEncoder
from foveate.families.unsupported import UNSUPPORTED


class DPTEncoder(PlainEncoder):
    """The encoder of `DPTModel`, and of models for depth and segmentation that have one."""

    layers_path = "encoder.layer"
    block = OLD_BLOCK
    masks_kernels = True


@register_family("depth_anything", "zoedepth", "dpt", "upernet", "vitpose")
class AroundBackbone(PlainEncoder):
    """`DepthAnythingForDepthEstimation` and the like: the encoder is that of their backbone.

    What neck and head read comes back at full length, so that they run as they are. DPT may have an
    encoder of its own instead of a backbone.

    Args:
        model: the model.

    Raises:
        UnsupportedModelError: the backbone is none that methods can act inside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        backbone = getattr(model, "backbone", None)
        self.within = DPTEncoder(model) if backbone is None else self._around(backbone)
        self.base = self.within.base
        self.text, self.layers, self.attention_layers = None, (), ()

    def _around(self, backbone: PreTrainedModel) -> PlainEncoder:
        model_type = backbone.config.model_type
        kind = FAMILIES.get(model_type)
        if not (isinstance(kind, type) and issubclass(kind, PlainEncoder)):
            reason = "which foveate does not know yet; those of DINOv2 and BEiT work"
            if model_type in UNSUPPORTED:
                reason = f"inside which methods cannot act: {UNSUPPORTED[model_type]}"
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads a backbone of type {model_type!r}, {reason}"
            )
        return kind(backbone)

    @property
    def encoder(self) -> Encoder:
        """The backbone's, or its own."""
        return self.within.encoder
