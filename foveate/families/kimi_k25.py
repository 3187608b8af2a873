"""Kimi K2.5 and K2.6: patches of any grid merged 2 x 2, and DeepSeek-V3's text model, whose
attention caches latents that keys and values are made of (MLA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core.tokens import Shape
from foveate.families.family import register_family
from foveate.families.gridded import Gridded


@register_family("kimi_k25")
class KimiK25(Gridded):
    """`Kimi_K25ForConditionalGeneration` and `Kimi_K25Model`.

    The processor cuts videos into chunks, each with features of its own; the tower pools the
    frames of a chunk, so that its tokens lie on one grid.
    """

    tower_path = "vision_tower"

    def side(self, modality: str) -> int:
        """Side of the cells of patches that are merged into a token."""
        return self.config.vision_config.merge_kernel_size[0]

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids in merged patches."""
        name = self.grid_names[modality]
        grids = arguments.get(name)
        frameless = {} if grids is None else {name: grids[:, 1:]}
        return super().shapes(modality, pooled, {**arguments, **frameless})
