"""What families share whose processor says the grid of patches of every image and video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families.encoder import Encoder
from foveate.families.family import Family
from foveate.families.towers import tower


class Gridded(Family):
    """Base of families whose processor hands over grids of patches.

    What counts as a frame are the pairs of frames that the encoder merges.
    """

    grid_names: ClassVar[Mapping[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}
    """Modality -> argument with (frames, height, width), or (height, width), of each image."""
    tower_path: ClassVar[str] = "visual"

    @property
    def encoder(self) -> Encoder | None:
        """The tower, which has no class token; all images are in one sequence."""
        return tower(self, self.tower_path)

    def side(self, modality: str) -> int:
        """Side of the cells of patches that are merged into a token."""
        return self.config.vision_config.spatial_merge_size

    def sides(self, modality: str, images: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        """The same for each of the last images.

        Args:
            modality: `image` or `video`.
            images: how many.
            arguments: what the features were made from.
        """
        return [self.side(modality)] * images

    def shapes(self, modality: str, pooled: Any, arguments: Mapping[str, Any]) -> list[Shape]:
        """Token counts, and grids in merged patches.

        Raises:
            InputError: a grid does not have as many cells as the image has features.
        """
        counts = [len(feature) for feature in pooled]
        name = self.grid_names[modality]
        grids = arguments.get(name)
        if grids is None:
            return super().shapes(modality, pooled, arguments)
        sides = self.sides(modality, len(counts), arguments)
        # In a later turn the grids are those of the whole conversation, the features the new ones.
        shapes = [
            Shape(count, (row[-2] // side, row[-1] // side), row[0] if len(row) > 2 else 1)
            for count, side, row in zip(counts, sides, grids[-len(counts) :].tolist(), strict=True)
        ]
        for count, (height, width), frames in shapes:
            if count != frames * height * width:
                said = " x ".join(map(str, (frames, height, width)[-grids.shape[-1] :]))
                raise InputError(
                    f"{name} says {said} visual tokens, but there are {count} features; pass the "
                    "grids that the processor returned with them"
                )
        return shapes

    def pixels(self, images: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """None: processors hand over patches."""
        return None
