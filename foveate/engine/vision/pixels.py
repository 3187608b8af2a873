"""Pixels of each row of an encoder that cuts images into patches itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.families import Encoder
from foveate.families.rows import cut


def pixels_of_rows(
    encoder: Encoder, images: Tensor | None, shape: Sequence[int], model_type: str
) -> Tensor:
    """Return (B N, P): pixels of the rows of all images, with zeros for special rows.

    Args:
        encoder: the encoder.
        images: (B, C, H, W) its input.
        shape: (B, N): images, and rows of each, special ones included.
        model_type: named in messages.

    Raises:
        UnsupportedModelError: the encoder's rows are not the patches of its images.
    """
    assert encoder.cuts is not None  # as planned
    assert images is not None  # as then
    patches = cut(images, encoder.cuts).flatten(1, 2)
    rows = torch.nn.functional.pad(patches, (0, 0, encoder.leading, encoder.trailing))
    if tuple(rows.shape[:2]) != tuple(shape):
        raise UnsupportedModelError(
            f"the encoder of this {model_type!r} has {shape[1]} rows for an image of "
            f"{patches.shape[1]} patches, so foveate does not know which pixels each row covers"
        )
    return rows.flatten(0, 1)
