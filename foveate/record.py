"""Record: what one forward did to each image.

The engine writes it; reports and drawings read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.boxes import cells_of
from foveate.tokens import Shape, frame_of


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a forward.

    Args:
        row: row of the batch it belongs to.
        total: visual tokens it had before anything was removed.
        grid: (height, width) of its token grid, of one frame in a video.
        kept: for each place at which a step acted, in stream order, the (K,) raster positions
            alive after it.
        place: finds out the boxes; without it, they are the cells of the grid. Called only when
            they are read.
        frames: frames of a video that its tokens tell apart; 1 for an image.
    """

    row: int
    total: int
    grid: tuple[int, int]
    kept: dict[str, Tensor] = field(default_factory=dict)
    place: Callable[[], Tensor] | None = field(default=None, repr=False)
    frames: int = 1

    @cached_property
    def boxes(self) -> Tensor:
        """(V, 4) left, top, right and bottom edge of each visual token, in [0, 1].

        They are shares of what the processor showed the model: of the picture after it was cropped
        or padded, if it was; of the tile, where each tile counts as an image; of the token's own
        frame in a video. NaN where a token shows no pixels, such as newlines, and where features
        were made outside the session and it is not known what of.
        """
        if self.place is not None:
            return self.place()
        return cells_of(Shape(self.total, self.grid, self.frames))

    @property
    def frame(self) -> Tensor:
        """(V,) frame of each visual token; tokens left over behind the last belong to it."""
        return frame_of(torch.arange(self.total), self.grid, self.frames)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the boxes, not the model that knows them."""
        return {**vars(self), "boxes": self.boxes, "place": None}


@dataclass(frozen=True, eq=False)
class Record:
    """One forward over a prompt.

    Args:
        rows: number of rows of the batch.
        prompt_tokens: (rows) real tokens of each row before anything was removed, without cached
            ones.
        images: all images, in order of appearance.
        layer_tokens: for each decoder layer, real tokens of each row that it saw: [layers][rows].
        cache_slots: for each decoder layer, slots of its KV cache afterwards, padding included;
            earlier turns count.
        pixels: what the vision encoder was fed within the session, (images, C, H, W), or `None`.
        encoder_tokens: for each encoder layer, rows of each image that its attention and its MLP
            saw, special tokens included; empty if nothing was done inside the encoder.
        notes: what a user should know, such as "no image in the prompt: nothing was removed".
    """

    rows: int
    prompt_tokens: list[int]
    images: list[ImageRecord]
    layer_tokens: list[list[int]]
    cache_slots: list[int]
    pixels: Tensor | None = None
    encoder_tokens: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def place_name(place: str) -> str:
    """A place in words: `llm:8` is `from layer 8 on`, `pre_llm` is `before the LLM`."""
    stage, _, layer = place.partition(":")
    if stage == "llm":
        return f"from layer {layer} on"
    if stage == "vision" and layer:
        return f"in encoder layer {layer}"
    return {"pre_llm": "before the LLM", "vision": "in the encoder"}.get(stage, place)
