"""VideoMAE: patches of two frames, in one sequence, without a class token."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import register_family
from foveate.families.plain import OLD_BLOCK, PlainEncoder


@register_family("videomae")
class VideoMAE(PlainEncoder):
    """`VideoMAEModel` and `VideoMAEForVideoClassification`.

    Args:
        model: the model.

    Raises:
        UnsupportedModelError: the model is one for pretraining.
    """

    layers_path = "encoder.layer"
    block = OLD_BLOCK
    class_token = False
    masks_kernels = True

    def __init__(self, model: PreTrainedModel) -> None:
        if hasattr(model, "mask_token"):
            raise UnsupportedModelError(
                f"{type(model).__name__} hides most patches from its encoder and learns to fill "
                "them in: those left are no grid, and each counts; use VideoMAEModel or a "
                "classifier"
            )
        super().__init__(model)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Patches of two frames, by default."""
        of = self.base.config
        return of.tubelet_size, of.patch_size, of.patch_size
