"""The record of a pass through an encoder."""

from __future__ import annotations

import functools

from foveate.core.tokens import Shape
from foveate.engine.images import Locate
from foveate.engine.inputs import of_shapes
from foveate.engine.vision.forward import Encoding
from foveate.record.record import ImageRecord, Record
from foveate.record.tiles import TokenBoxes


def describe(encoding: Encoding) -> Record:
    """The record of a pass through an encoder."""
    images = [
        ImageRecord(
            n, shape.total, shape.grid, dict(kept), _locate(encoding, n, shape),
            shape.frames,
        )
        for n, (shape, kept) in enumerate(encoding.survivors())
    ]  # fmt: skip
    return Record(
        rows=len(images),
        prompt_tokens=[],
        images=images,
        layer_tokens=[],
        cache_slots=[],
        pixels=None if any(image.frames > 1 for image in images) else encoding.pixels,
        encoder_tokens=encoding.layer_rows,
        encoder_bounds=encoding.layer_bounds,
        encoded={"image": of_shapes(encoding.arguments)},
        results=encoding.results(),
    )


def _locate(encoding: Encoding, number: int, shape: Shape) -> Locate | None:
    """What finds out where the tokens of an image of an encoder alone lie, if that depends on
    what it was called with.
    """
    family = encoding.family
    if family.text_layers or not family.placed_by:
        return None
    arguments = {n: a for n, a in encoding.arguments.items() if n in family.placed_by}
    boxes = functools.partial(family.boxes, "image", number, shape, arguments)
    return lambda: TokenBoxes(boxes())
