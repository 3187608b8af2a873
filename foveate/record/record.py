"""Record: what one forward did to each image.

The engine writes it; reports and drawings read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.core.step import site_of
from foveate.core.tokens import Shape, frame_of
from foveate.errors import InputError
from foveate.record.boxes import cells_of
from foveate.record.tiles import TokenBoxes


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a forward.

    Args:
        row: row of the batch it belongs to.
        total: visual tokens it had before anything was removed.
        grid: (height, width) of its token grid, of one frame in a video.
        kept: for each step, in stream order, its entry -> the (K,) raster positions that
            survive it. An entry is the step's site, as `llm:8`; of several steps at one site, those
            before the last are `llm:8#1`, `llm:8#2`.
        locate: finds out where it is; without it, boxes are the cells of the grid. Called only when
            that is read.
        frames: frames of a video that its tokens tell apart; 1 for an image.
        audio: whether it is a clip of audio, whose one row of tokens runs through time.
    """

    row: int
    total: int
    grid: tuple[int, int]
    kept: dict[str, Tensor] = field(default_factory=dict)
    locate: Callable[[], TokenBoxes] | None = field(default=None, repr=False)
    frames: int = 1
    audio: bool = False

    @property
    def boxes(self) -> Tensor:
        """(V, 4) left, top, right and bottom edge of each visual token, in [0, 1].

        They are shares of what the processor showed the model: of the image, after it was cropped
        or padded; of the tile, where `whole` is false; of the token's own frame in a video. NaN
        where a token shows no pixels, such as a newline, and where features were made outside the
        session from unknown pixels.
        """
        return self._token_boxes.boxes

    def surviving(self, layer: int) -> int:
        """Tokens of it that a decoder layer sees; -1 for those that enter the language model."""
        count = self.total
        for entry, kept in self.kept.items():
            stage, number, _ = site_of(entry)
            if stage != "llm" or number <= layer:
                count = len(kept)
        return count

    @property
    def left(self) -> int:
        """Tokens of it that survive its last step."""
        return len(list(self.kept.values())[-1]) if self.kept else self.total

    def before(self, entry: str) -> int:
        """Tokens of it that a step found."""
        names = list(self.kept)
        number = names.index(entry)
        return len(self.kept[names[number - 1]]) if number else self.total

    @property
    def tile(self) -> tuple[int, int]:
        """Which of how many tiles it is, where an image was cut into tiles; else (0, 1)."""
        return self._token_boxes.tile

    @property
    def whole(self) -> bool:
        """Whether boxes are shares of the whole image.

        False for a tile if neither the prompt nor the pixels say how tiles are arranged.
        """
        return self._token_boxes.whole

    @property
    def frame(self) -> Tensor:
        """(V,) frame of each visual token; tokens after the last belong to it."""
        return frame_of(torch.arange(self.total), self.grid, self.frames)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the boxes, not the model that knows them."""
        return {**vars(self), "_token_boxes": self._token_boxes, "locate": None}

    @cached_property
    def _token_boxes(self) -> TokenBoxes:
        if self.locate is not None:
            return self.locate()
        return TokenBoxes(cells_of(Shape(self.total, self.grid, self.frames)))


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
        text_only_layers: decoder layers whose caches hold text alone.
        evicted_before: the decoder layer before which caches of earlier layers evicted what is
            removed there, the last if there are several; 0 for none.
        last_tokens_from: the decoder layer from which on the text model went on with the last
            tokens alone, as it does without removal too; `None` for none.
        pixels: what the vision encoder was fed within the session, (images, C, H, W), or `None`.
        encoder_tokens: for each encoder layer, rows of each image that its attention and its MLP
            saw, special tokens included, or rows of all images where they lie in one sequence;
            empty if nothing was done inside the encoder.
        encoder_bounds: for each encoder layer, boundaries of the segments within which its rows
            attend, or `None`; empty as `encoder_tokens`.
        encoded: modality -> what its features were made from in this forward, with the shapes of
            floating-point tensors only; empty where features were handed in.
        projected: modality -> rows that the projector was given once more, because a method had
            merged them.
        question_tokens: text tokens after the images of a row, padding included; 0 where no
            method read them.
        common_tokens: text tokens before the last image of a row, padding included, that images
            attend to where layers compute less of them; 0 where all layers compute all.
        embedding: numbers of an embedding, and bytes of a number, where the model makes one of each
            token that its last layer saw; else `None`.
        keep_total: (rows) visual tokens that each row may hold, earlier turns included; empty for
            any number.
        earlier_tokens: (rows) those that it holds of earlier turns.
        results: number of a method with exits -> what it has noted in its memory in the last pass.
        notes: what a user should know, such as "no image in the prompt: nothing was removed".
    """

    rows: int
    prompt_tokens: list[int]
    images: list[ImageRecord]
    layer_tokens: list[list[int]]
    cache_slots: list[int]
    evicted_before: int = 0
    text_only_layers: tuple[int, ...] = ()
    last_tokens_from: int | None = None
    pixels: Tensor | None = None
    encoder_tokens: list[tuple[int, int]] = field(default_factory=list)
    encoder_bounds: list[Tensor | None] = field(default_factory=list)
    encoded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    projected: Mapping[str, int] = field(default_factory=dict)
    question_tokens: int = 0
    common_tokens: int = 0
    embedding: tuple[int, int] | None = None
    results: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    keep_total: list[int] = field(default_factory=list)
    earlier_tokens: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def visual_tokens(self, row: int) -> tuple[int, int]:
        """Visual tokens of a row, and those that survive their last step."""
        images = [image for image in self.images if image.row == row]
        return sum(image.total for image in images), sum(image.left for image in images)

    def entering(self, row: int) -> int:
        """Visual tokens of a row that enter the language model in this forward."""
        return sum(image.surviving(-1) for image in self.images if image.row == row)


def site_name(entry: str) -> str:
    """An entry of a record in words: `llm:8` is `from layer 8 on`, `pre_llm` is `before the LLM`,
    `llm:8#1` is `from layer 8 on, step 1`.
    """
    stage, layer, number = site_of(entry)
    names = {"llm": f"from layer {layer} on", "pre_llm": "before the LLM"}
    names["vision"] = f"in encoder layer {layer}" if ":" in entry else "in the encoder"
    return names.get(stage, entry) + (f", step {number}" if number else "")


def by_image(records: Sequence[ImageRecord]) -> list[list[ImageRecord]]:
    """Records in order of appearance, tiles of one image together."""
    images: list[list[ImageRecord]] = []
    for record in records:
        if record.tile[0] == 0:
            images.append([])
        images[-1].append(record)
    return images


def alone(image: ImageRecord) -> ImageRecord:
    """A tile as an image of its own."""
    return image if image.tile[1] == 1 else dataclasses.replace(image, locate=None)


def joined(tiles: Sequence[ImageRecord]) -> ImageRecord:
    """All tiles of an image as one record, whose tokens form one row.

    Raises:
        InputError: it is not known how they are arranged.
    """
    first = tiles[0]
    if len(tiles) == 1:
        return first
    if not all(tile.whole for tile in tiles):
        raise InputError(
            f"an image was cut into {len(tiles)} tiles, and neither the prompt nor the pixels say "
            "how they are arranged; pass the tiles, each as an image"
        )
    starts = [0, *accumulate(tile.total for tile in tiles)]
    kept = {
        site: torch.cat([t.kept[site] + start for t, start in zip(tiles, starts, strict=False)])
        for site in first.kept
    }
    boxes = TokenBoxes(torch.cat([tile.boxes for tile in tiles]))
    return ImageRecord(first.row, starts[-1], (1, starts[-1]), kept, lambda: boxes)
