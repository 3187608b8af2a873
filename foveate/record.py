"""Record: what one forward did to each image.

The engine writes it; reports and drawings read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a forward.

    Args:
        row: row of the batch it belongs to.
        total: visual tokens it had before anything was removed.
        grid: (height, width) of its token grid; `total` is their product.
        kept: for each place at which a step acted, in stream order, the (K,) raster positions
            alive after it.
    """

    row: int
    total: int
    grid: tuple[int, int]
    kept: dict[str, Tensor] = field(default_factory=dict)


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
