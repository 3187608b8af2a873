"""Image features: what the encoder's output carries besides them, and which image is which."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.engine.images import ImageState
from foveate.errors import InputError

_BEAMS = (
    "transformers gives the beams of a row different images, or clips of audio, on this model if "
    "the row has several; use one beam and one returned sequence, or one image or clip in each row"
)


@dataclass(frozen=True, eq=False)
class EncoderOutputInfo:
    """What is known of the images of an encoder output besides their features.

    Args:
        shapes: tokens, grid and frames of each image.
        signals: (signal, encoder layer) -> (C, V) of each image.
        pixels: what the encoder was fed.
        kept: entry of each step inside the encoder -> (K) positions of each image that survive it,
            ascending.
        arguments: those that say where tokens lie (`Family.placed_by`).
        projector: what makes tokens one by one, if methods merge before it.
        unprojected: (V, C) what it is given for each image.
        mixes: whether tokens of some image are made, or mixed afterwards, several at a time; on the
            device until it is read.
        fed: what the features were made from, with shapes of floating-point tensors only.
        without_text: rows in which an image had no text after it that a method asked for.
        projected: rows that the projector was given once more, because they were merged.
        states: what the pre_llm steps have made of each image; empty before they ran.
        encoder_tokens: as in `Record`.
        encoder_bounds: as in `Record`.
    """

    shapes: Sequence[Shape]
    signals: Mapping[tuple[str, int], Sequence[Tensor]]
    pixels: Any = None
    kept: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    states: list[ImageState] = field(default_factory=list)
    projector: Any = None
    unprojected: Sequence[Tensor] = ()
    mixes: bool | Tensor = True
    projected: int = 0
    fed: Mapping[str, Any] = field(default_factory=dict)
    without_text: tuple[int, ...] = ()
    encoder_tokens: Sequence[tuple[int, int]] = ()
    encoder_bounds: Sequence[Tensor | None] = ()

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each image."""
        return [shape.total for shape in self.shapes]

    def kept_of(self, image: int) -> dict[str, Tensor]:
        """Entry of each step inside the encoder -> (K) raster positions of an image after it."""
        return {site: kept[image] for site, kept in self.kept.items()}

    def surviving(self, images: Sequence[int]) -> list[Tensor] | None:
        """(K) raster positions of some images that survive the encoder; `None` for all."""
        last = list(self.kept.values())[-1:]
        return [last[0][image] for image in images] if last else None


@functools.cache
def _tagged(kind: Any) -> Any:
    return type(
        f"Foveated{kind.__name__}", (kind,), {"foveated": True, "encoded": None, "marked": False}
    )


def tag(output: Any, encoded: EncoderOutputInfo) -> None:
    """Make an encoder output carry what is known of its images.

    The class survives whatever `generate` does to the output; the attributes are lost when chunked
    prefill slices it, which is how a slice is recognised.
    """
    output.__class__ = _tagged(type(output))  # type: ignore[arg-type]
    output.encoded, output.marked = encoded, False


def is_tagged(output: Any) -> bool:
    """Whether an encoder output went through a session, whole or in part."""
    return getattr(output, "foveated", False)


def is_slice(output: Any) -> bool:
    """Whether the output is a part of a tagged one, as chunked prefill makes them."""
    return is_tagged(output) and output.encoded is None


def pooled(output: Any) -> Any:
    """The features of all images, (images, V, D) or a list of (V, D): what is placed in the prompt,
    or else what is added before the earliest decoder layer; `None` if there are none.
    """
    placed = getattr(output, "pooler_output", None)
    if placed is not None:
        return placed
    order = _by_layer(output)
    return output.deepstack_features[order[0]][1] if order else None


def sheets(output: Any) -> list[Any]:
    """The features, and then what else decoder layers are given for the same tokens (DeepStack)."""
    planes = getattr(output, "deepstack_features", None) or []
    if order := _by_layer(output):
        return [planes[place][1] for place in order]
    return [output.pooler_output, *planes]


def put_sheets(output: Any, sheets: Sequence[Any]) -> None:
    """Replace the sheets of an encoder output."""
    if order := _by_layer(output):
        planes = list(output.deepstack_features)
        for place, sheet in zip(order, sheets, strict=True):
            planes[place] = planes[place][0], sheet
        output.deepstack_features = planes
        return
    output.pooler_output, *planes = sheets
    if planes:
        output.deepstack_features = planes


def _by_layer(output: Any) -> list[int]:
    """Places of planes that come with the decoder layers that they are added before, ascending; of
    several for one layer the last comes first, which is the one that the model adds.
    """
    planes = getattr(output, "deepstack_features", None) or []
    if not planes or not isinstance(planes[0][0], int):  # but tensors, or those of each image
        return []
    return sorted(range(len(planes)), key=lambda place: (planes[place][0], -place))


def members(output: Any, visual: Tensor, expanded: int) -> list[int]:
    """Which image of the encoder each image of a forward is.

    Args:
        output: tagged output; `generate` repeats all images of a row for each of its beams.
        visual: (B, T) placeholders.
        expanded: how often each row was repeated.

    Raises:
        InputError: transformers gives the beams of a row different images.
    """
    lengths = output.encoded.lengths
    if sum(feature.shape[:-1].numel() for feature in pooled(output)) == sum(lengths):
        return list(range(len(lengths)))
    numbers: list[int] = []
    image = 0
    for count in visual[::expanded].sum(1).tolist():
        of_row = []
        while count > 0:
            of_row.append(image)
            count -= lengths[image]
            image += 1
        numbers += of_row * expanded
    _check_beams(feature_rows(pooled(output)), visual[::expanded].sum(1).tolist(), expanded)
    return numbers


def check_order(lengths: Sequence[int], visual: Tensor, expanded: int) -> None:
    """Refuse images that were repeated one by one before they were encoded, where a row has several
    of them.

    Args:
        lengths: visual tokens of each image, in the order of the encoder.
        visual: (B, T) placeholders.
        expanded: how often each row was repeated.

    Raises:
        InputError: beams see each other's images.
    """
    if expanded == 1:
        return
    images = iter(lengths)
    for count in visual.sum(1).tolist():
        if count and next(images) < count:
            raise InputError(_BEAMS)


def tokens_of(output: Any, source: Sequence[int]) -> Sequence[Tensor]:
    """(V, D) features of each image of a forward; `source` as `members` gives it."""
    rows, lengths = feature_rows(pooled(output)), output.encoded.lengths
    starts = starts_of(output, source)
    return [rows[s : s + lengths[image]] for s, image in zip(starts, source, strict=True)]


def starts_of(output: Any, source: Sequence[int]) -> list[int]:
    """First row of each image of a forward among all features; `source` as `members` gives it."""
    lengths = output.encoded.lengths
    if sum(feature.shape[:-1].numel() for feature in pooled(output)) == sum(lengths):
        starts = list(accumulate(lengths, initial=0))
        return [starts[image] for image in source]  # perhaps not of all
    return list(accumulate((lengths[image] for image in source), initial=0))[:-1]


def _check_beams(rows: Tensor, counts: Sequence[int], expanded: int) -> None:
    """Refuse features that were repeated one by one, so that beams see each other's images."""
    blocks = rows.split([count * expanded for count in counts])
    beams = torch.cat([block.view(expanded, -1, block.shape[-1]) for block in blocks], dim=1)
    if not torch.equal(beams.nan_to_num(), beams[:1].nan_to_num().expand_as(beams)):
        raise InputError(_BEAMS)


def feature_rows(pooled: Any) -> Tensor:
    """All features as (N, D), whatever they come in."""
    if isinstance(pooled, Tensor):
        return pooled.reshape(-1, pooled.shape[-1])
    rows = [feature.reshape(-1, feature.shape[-1]) for feature in pooled]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
