"""Boxes: where in the user's images the tokens of a forward lie.

Nothing is worked out before a record is read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.engine.features import EncoderOutputInfo
from foveate.families import Family
from foveate.record.tiles import Tiling, TokenBoxes, in_image, match_grid


class ImageBoxes:
    """Where the images of one modality in a forward, and their tokens, lie.

    Args:
        family: the model.
        modality: `image` or `video`.
        encoded: what is known of the encoder's images.
        source: which image of the encoder each image of the forward is.
        visual: (B, T) placeholders.
        ids: (B, T) token ids, if they are known.
    """

    def __init__(
        self,
        family: Family,
        modality: str,
        encoded: EncoderOutputInfo,
        source: Sequence[int],
        visual: Tensor,
        ids: Tensor | None,
    ) -> None:
        self.family, self.modality, self.encoded, self.source = family, modality, encoded, source
        self.visual, self.ids = visual, ids

    def of(self, image: int) -> TokenBoxes:
        """Where an image of the forward is."""
        boxes = self._boxes(self.source[image])
        first, tiling = self._tilings[image]
        tile, count = image - first, tiling.tiles
        if count == 1:
            return TokenBoxes(boxes)
        thumbnail = self.family.thumbnail % count if tiling.thumbnail else count
        if tile == thumbnail:
            return TokenBoxes(boxes, (tile, count))
        grid = self._grid(first, tiling)
        if grid is None:
            return TokenBoxes(boxes, (tile, count), False)
        return TokenBoxes(in_image(boxes, tile - (tile > thumbnail), grid), (tile, count))

    def _boxes(self, image: int) -> Tensor:
        """(V, 4) boxes of an image of the encoder."""
        arguments = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in self.encoded.arguments.items()
        }
        shape = self.encoded.shapes[image]
        # In a later turn arguments are those of all the conversation, so count from the last.
        number = image - len(self.encoded.shapes)
        boxes = self.family.boxes(self.modality, number, shape, arguments)
        if len(boxes) != shape.total:  # features from elsewhere, of something else
            return torch.full((shape.total, 4), torch.nan)
        return boxes

    @functools.cached_property
    def _tilings(self) -> list[tuple[int, Tiling]]:
        """For each image of the forward, the first tile of what the user passed, and its tiling."""
        rows: dict[int, list[tuple[int, int]]] = {}
        where, start = self.visual.nonzero().tolist(), 0
        for image in self.source:
            stop = start + self.encoded.shapes[image].total
            rows.setdefault(where[start][0], []).append((where[start][1], where[stop - 1][1] + 1))
            start = stop
        tilings: list[tuple[int, Tiling]] = []
        for row, spans in rows.items():
            ids = None if self.ids is None else self.ids[row].tolist()
            for tiling in self.family.tilings(ids, spans):
                tilings += [(len(tilings), tiling)] * tiling.tiles
        return tilings

    def _grid(self, first: int, tiling: Tiling) -> tuple[int, int] | None:
        """(rows, columns) of an image's tiles: what the prompt says, or else their pixels."""
        pixels = self.encoded.pixels
        if tiling.grid is not None or not tiling.thumbnail:
            return tiling.grid
        if pixels is None or pixels.dim() != 4:  # padded with tiles
            return None
        images = [self.source[first + n] for n in range(tiling.tiles)]
        thumbnail = images.pop(self.family.thumbnail)
        return match_grid(pixels[images], pixels[thumbnail])
