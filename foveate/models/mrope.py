"""What families with M-RoPE share: positions in time, height and width, and grids given as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.boxes import cells
from foveate.errors import InputError
from foveate.models.family import Encoder, Family
from foveate.models.towers import tower


class MRope(Family):
    """Base of families whose processor hands over `image_grid_thw` and `video_grid_thw`.

    A video is one image whose frames lie one above the other: its grid is (frames x height, width).
    """

    one_dimensional = False
    placed_by = ("image_grid_thw", "video_grid_thw")

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; all pictures are in one sequence."""
        return tower(self, "visual")

    def side(self, modality: str) -> int:
        """Side of the cells of patches that are merged into a token."""
        return self.config.vision_config.spatial_merge_size

    def shapes(
        self, modality: str, pooled: Any, arguments: Mapping[str, Any]
    ) -> list[tuple[int, tuple[int, int]]]:
        """Token counts, and grids in merged patches.

        Raises:
            InputError: a grid does not have as many cells as the image has features.
        """
        counts = [len(feature) for feature in pooled]
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None:
            return super().shapes(modality, pooled, arguments)
        merge = self.config.vision_config.spatial_merge_size
        # In a later turn the grids are those of the whole conversation, the features the new ones.
        merged = [(t * h // merge, w // merge) for t, h, w in grids[-len(counts) :].tolist()]
        for count, (height, width) in zip(counts, merged, strict=True):
            if count != height * width:
                raise InputError(
                    f"{modality}_grid_thw says {height} x {width} visual tokens, but there are "
                    f"{count} features; pass the grids that the processor returned with them"
                )
        return list(zip(counts, merged, strict=True))

    def boxes(
        self, modality: str, number: int, grid: tuple[int, int], arguments: Mapping[str, Any]
    ) -> Tensor:
        """Cells of the picture; of a video, of the token's frame."""
        frames = self.frames(modality, number, grid, arguments)
        return cells(grid[0] // frames, grid[1]).repeat(frames, 1)

    def frames(
        self, modality: str, number: int, grid: tuple[int, int], arguments: Mapping[str, Any]
    ) -> int:
        """Frames after pairs of them were merged."""
        grids = arguments.get(f"{modality}_grid_thw")
        return 1 if grids is None else int(grids[number][0])
