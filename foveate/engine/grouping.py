"""Grouping: which images of a forward have the same shape, and where their tokens are.

Shapes: `V` tokens of an image, `B` batch, `T` logical length, `K` tokens that survive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.engine.images import Group, Kept, Left, Place
from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one modality in a forward.

    Args:
        visual: (B, T) their placeholders.
        shapes: tokens, grid and frames of each image, in order of appearance.
        dead: (N) for each placeholder in row-major order, whether its token was removed before the
            text model.
        before: for each image, place inside the encoder -> (K) raster positions alive behind it.
        places: for each image, how to find out where in it the tokens lie.
        left: for each image, what the steps before the language model have left of it; empty where
            it is not known.
    """

    visual: Tensor
    shapes: Sequence[Shape]
    dead: Tensor | None = None
    before: Sequence[Kept] = ()
    places: Sequence[Place | None] = ()
    left: Sequence[Left] = ()


@dataclass(frozen=True, eq=False)
class _Span:
    row: int
    columns: Tensor
    index: Tensor
    shape: Shape
    before: Kept
    place: Place | None
    began: Mapping[int, int]
    labels: Mapping[int, Tensor]


def group_features(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    ends: Sequence[int],
    device: torch.device,
    alive: Sequence[Tensor] | None = None,
    readout: Sequence[bool] = (),
) -> list[Group]:
    """Group images by shape, before their place in the sequence is known.

    Args:
        shapes: tokens, grid and frames of each image.
        rows: row of the batch of each image.
        ends: logical position of each image's last token; empty where it is not known.
        device: where the features live.
        alive: (K) raster positions that the encoder has left of each image; `None` for all.
        readout: for each image, whether a next token is read from it; empty where none is.
    """
    alike: dict[tuple[Shape, int], list[int]] = defaultdict(list)
    for image, shape in enumerate(shapes):
        left = shape.total if alive is None else len(alive[image])
        alike[shape, left].append(image)
    return [
        Group(
            tuple(images),
            tuple(rows[i] for i in images),
            torch.arange(shape.total, device=device).expand(len(images), shape.total)
            if alive is None
            else torch.stack([alive[i] for i in images]).to(device),
            shape,
            tuple(ends[i] for i in images) if ends else (),
            readout=tuple(readout[i] for i in images) if readout else (),
        )
        for (shape, _), images in alike.items()
    ]


def locate(parts: Sequence[Part], readout: Tensor | None = None) -> list[Group]:
    """Find the images of a forward, and what is alive of them; they are numbered in order of
    appearance.

    Args:
        parts: the images of each modality.
        readout: (B, T) visual tokens that a next token is read from; `None` if there are none.

    Raises:
        InputError: placeholders and features disagree, or an image spans two rows.
    """
    spans = sorted(
        (span for part in parts for span in _spans(part)),
        key=lambda span: (span.row, int(span.columns[0])),
    )
    alike: dict[tuple[Shape, int, frozenset[int]], list[int]] = defaultdict(list)
    for image, span in enumerate(spans):
        alike[span.shape, len(span.index), frozenset(span.labels)].append(image)
    device = parts[0].visual.device if parts else None
    return [
        Group(
            tuple(images),
            tuple(spans[i].row for i in images),
            torch.stack([spans[i].index for i in images]).to(device),
            shape,
            tuple(int(spans[i].columns[-1]) for i in images),
            torch.stack([spans[i].columns[spans[i].index.sort().values] for i in images]).to(
                device
            ),
            tuple(spans[i].before for i in images),
            tuple(spans[i].place for i in images),
            any(left.index is not None for part in parts for left in part.left),
            tuple(spans[i].began for i in images),
            {n: torch.stack([spans[i].labels[n] for i in images]).to(device) for n in numbers},
            ()
            if readout is None
            else tuple(bool(readout[spans[i].row, spans[i].columns[-1]]) for i in images),
        )
        for (shape, _, numbers), images in alike.items()
    ]


def _spans(part: Part) -> list[_Span]:
    where = part.visual.nonzero().cpu()
    tokens = sum(shape.total for shape in part.shapes)
    if where.shape[0] != tokens:
        raise InputError(
            f"the prompt has {where.shape[0]} image placeholders, but the images have "
            f"{tokens} visual tokens"
        )
    alive = torch.ones(where.shape[0], dtype=torch.bool) if part.dead is None else ~part.dead.cpu()
    spans = []
    start = 0
    before = part.before or [{}] * len(part.shapes)
    places = part.places or [None] * len(part.shapes)
    lefts: Sequence[Left | None] = part.left or [None] * len(part.shapes)
    images = zip(part.shapes, before, places, lefts, strict=True)
    for shape, kept, place, left in images:
        stop = start + shape.total
        at, living = where[start:stop], alive[start:stop]
        start = stop
        if not shape.total:
            continue
        row = int(at[0, 0])
        if row != int(at[-1, 0]):
            raise InputError(
                f"an image has {shape.total} visual tokens, but its placeholders lie in two rows"
            )
        index = living.nonzero()[:, 0]
        if left is not None and len(index) != left.count:
            raise InputError(
                f"{left.count - len(index)} visual tokens of an image of {shape.total} hold NaN, "
                "which marks removed tokens: look for a NaN in the pixels, in the encoder (an "
                "overflow in float16?), or in what a method makes of merged tokens"
            )
        if left is None:
            left = Left(len(index), {}, {})
        elif left.index is not None:
            index = left.index.cpu()
        kept = {**kept, **left.kept}
        spans.append(_Span(row, at[:, 1], index, shape, kept, place, left.began, left.labels))
    return spans


def rows_of(visual: Tensor, shapes: Sequence[Shape]) -> tuple[list[int], list[int]]:
    """The row of the batch of each image, and the logical position of its last token.

    Args:
        visual: (B, T) placeholders.
        shapes: tokens, grid and frames of each image, in order of appearance.
    """
    spans = _spans(Part(visual, shapes))
    return [span.row for span in spans], [int(span.columns[-1]) for span in spans]
