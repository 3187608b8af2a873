"""Kimi K2.5 and K2.6: patches of any grid merged 2 x 2, and DeepSeek-V3's text model, whose
attention caches latents that keys and values are made of (MLA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.encoder import Encoder
from foveate.families.family import Family, register_family
from foveate.families.towers import tower


@register_family("kimi_k25")
class KimiK25(Family):
    """`Kimi_K25ForConditionalGeneration` and `Kimi_K25Model`.

    The processor cuts videos into chunks, each with features of its own; the tower pools the
    frames of a chunk, so that its tokens lie on one grid.
    """

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; all pictures are in one sequence."""
        return tower(self, "vision_tower")

    def side(self, modality: str) -> int:
        """Side of the cells of patches that are merged into a token."""
        return self.config.vision_config.merge_kernel_size[0]

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids in merged patches.

        Raises:
            InputError: a grid does not have as many cells as the image has features.
        """
        counts, side = [len(feature) for feature in pooled], self.side(modality)
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None:
            return super().shapes(modality, pooled, arguments)
        # In a later turn the grids are those of the whole conversation, the features the new ones.
        sizes = [(h // side, w // side) for _, h, w in grids[-len(counts) :].tolist()]
        for count, (height, width) in zip(counts, sizes, strict=True):
            if count != height * width:
                raise InputError(
                    f"{modality}_grid_thw says {height} x {width} visual tokens, but there are "
                    f"{count} features; pass the grids that the processor returned with them"
                )
        return [Shape(count, size) for count, size in zip(counts, sizes, strict=True)]
