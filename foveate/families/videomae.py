"""VideoMAE: patches of two frames, in one sequence, without a class token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    films = True
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
    def patches(self) -> Callable[[Mapping[str, Any]], tuple[int, int, int]]:
        """Patches of two frames, by default, along time, height and width."""
        return self._tubelets

    def _tubelets(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, height, width = arguments["pixel_values"].shape[1:]
        side = self.base.config.patch_size
        return frames // self.base.config.tubelet_size, height // side, width // side
