"""Grouping: which images a forward of the language model has, and where their tokens are.

Shapes: `V` surviving tokens of an image, `B` batch, `T` logical length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.engine.images import Image, ImageGroup, ImageState, Kept, Locate, group_images
from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class ModalityImages:
    """Images of one modality in a forward.

    Args:
        visual: (B, T) their placeholders, on the host.
        shapes: tokens, grid and frames of each image, in order of appearance.
        dropped: (N) for each placeholder in row-major order, whether its token was dropped before
            the text model, on the host.
        kept: for each image, entry of each step inside the encoder -> (K) raster positions that
            survive it.
        locate: for each image, what finds out where in it the tokens lie.
        states: for each image, what the steps before the language model have made of it; empty
            where that is not known.
        audio: whether they are clips of audio.
    """

    visual: Tensor
    shapes: Sequence[Shape]
    dropped: Tensor | None = None
    kept: Sequence[Kept] = ()
    locate: Sequence[Locate | None] = ()
    states: Sequence[ImageState] = ()
    audio: bool = False


@dataclass(frozen=True, eq=False)
class _Span:
    row: int
    columns: Tensor
    surviving: Tensor  # columns of what survives
    index: Tensor
    shape: Shape
    kept: Kept
    locate: Locate | None
    tokens_at_start: Mapping[int, int]
    labels: Mapping[int, Tensor]
    order: Tensor | None
    audio: bool

    def image(
        self, number: int, request: Callable[[int], int], readout: Tensor | None = None
    ) -> Image:
        """The image; arguments as in `images_in`."""
        last = int(self.columns[-1])
        is_read = readout is not None and bool(readout[self.row, last])
        return Image(
            number=number,
            row=self.row,
            request=request(self.row),
            end=last,
            required=self.shape.total - 1 if is_read else -1,
            kept=self.kept,
            locate=self.locate,
            tokens_at_start=self.tokens_at_start,
            order=self.order,
            audio=self.audio,
        )


def find_images(
    modalities: Sequence[ModalityImages],
    request: Callable[[int], int],
    device: torch.device,
    readout: Tensor | None = None,
) -> list[ImageGroup]:
    """Find the images of a forward and what survives of them, numbered in order of appearance.

    Args:
        modalities: the images of each modality.
        request: batch row to entry of a per-request budget.
        device: where the groups live.
        readout: (B, T) visual tokens that a next token is read from; `None` if there are none.

    Raises:
        InputError: placeholders and features disagree, or an image spans two rows.
    """
    if not modalities:
        return []
    spans = sorted(
        (span for modality in modalities for span in _spans(modality)),
        key=lambda span: (span.row, int(span.columns[0])),
    )
    return group_images(
        [span.image(number, request, readout) for number, span in enumerate(spans)],
        [span.shape for span in spans],
        device,
        [span.index for span in spans],
        [span.surviving for span in spans],
        [span.labels for span in spans],
        ordered=any(state.index is not None for of in modalities for state in of.states),
    )


def images_in(
    visual: Tensor,
    shapes: Sequence[Shape],
    request: Callable[[int], int],
    readout: Tensor | None = None,
    *,
    audio: bool = False,
) -> list[Image]:
    """The images of one modality, before any step on their features.

    Args:
        visual: (B, T) placeholders.
        shapes: tokens, grid and frames of each image, in order of appearance.
        request: batch row to entry of a per-request budget.
        readout: (B, T) visual tokens that a next token is read from; `None` if there are none.
        audio: whether they are clips of audio.
    """
    spans = _spans(ModalityImages(visual, shapes, audio=audio))
    return [span.image(number, request, readout) for number, span in enumerate(spans)]


def _spans(of: ModalityImages) -> list[_Span]:
    placeholders = of.visual.nonzero()
    tokens = sum(shape.total for shape in of.shapes)
    if placeholders.shape[0] != tokens:
        raise InputError(
            f"the prompt has {placeholders.shape[0]} image placeholders, but the images have "
            f"{tokens} visual tokens"
        )
    surviving = torch.ones(tokens, dtype=torch.bool) if of.dropped is None else ~of.dropped
    spans = []
    start = 0
    kept = of.kept or [{}] * len(of.shapes)
    locate = of.locate or [None] * len(of.shapes)
    states: Sequence[ImageState | None] = of.states or [None] * len(of.shapes)
    for shape, before, find, state in zip(of.shapes, kept, locate, states, strict=True):
        stop = start + shape.total
        at, survives = placeholders[start:stop], surviving[start:stop]
        start = stop
        if not shape.total:
            continue
        row = int(at[0, 0])
        if row != int(at[-1, 0]):
            raise InputError(
                f"an image has {shape.total} visual tokens, but its placeholders lie in two rows"
            )
        index = survives.nonzero()[:, 0]
        if state is None:
            state = ImageState(len(index), {}, {})
        _check_marks(state, index, shape)
        columns, kept_by_all = at[:, 1], {**before, **state.kept}
        begun, labels, order = state.tokens_at_start, state.labels, state.order
        there, index = columns[index], index if state.index is None else state.index
        spans.append(
            _Span(
                row, columns, there, index, shape, kept_by_all, find, begun, labels, order, of.audio
            )
        )
    return spans


def _check_marks(state: ImageState, index: Tensor, shape: Shape) -> None:
    """Refuse an image of which fewer tokens arrive than survived its steps."""
    if len(index) != state.count:
        raise InputError(
            f"{state.count - len(index)} visual tokens of an image of {shape.total} hold NaN, "
            "which marks removed tokens: look for a NaN in the pixels, in the encoder (an "
            "overflow in float16?), or in what a method makes of merged tokens"
        )
