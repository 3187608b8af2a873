"""YOLOS: ViT whose detection tokens follow the patches."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import register_family
from foveate.families.plain import OLD_BLOCK, PlainEncoder


@register_family("yolos")
class Yolos(PlainEncoder):
    """`YolosModel` and `YolosForObjectDetection`.

    Detection tokens are special rows: none is removed, and the heads read them as they are.

    Args:
        model: the model.

    Raises:
        UnsupportedModelError: positions are added between layers.
    """

    layers_path = "encoder.layer"
    block = OLD_BLOCK
    masks_kernels = True

    def __init__(self, model: PreTrainedModel) -> None:
        if model.config.use_mid_position_embeddings:
            raise UnsupportedModelError(
                f"this {type(model).__name__} adds position embeddings of all patches to the "
                "states after each layer but the last (use_mid_position_embeddings), which have no "
                "row for a patch that is gone; YOLOS checkpoints without them work"
            )
        super().__init__(model)

    @property
    def trailing_tokens(self) -> int:
        """The detection tokens."""
        return self.config.num_detection_tokens
