"""Pixels: what the rows of an encoder are made of, where it cuts images into patches itself."""

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
    """(B N, P) pixels of the rows of all images; zeros for special rows.

    Args:
        encoder: the encoder.
        images: (B, C, H, W) what it is handed.
        shape: (B, N) images and rows of each.
        model_type: named where something is refused.

    Raises:
        UnsupportedModelError: rows are not the patches that images are cut into.
    """
    assert encoder.cuts is not None  # as planned
    assert images is not None  # as then
    patches = cut(images, encoder.cuts).flatten(1, 2)
    rows = torch.nn.functional.pad(patches, (0, 0, encoder.leading, encoder.trailing))
    if tuple(rows.shape[:2]) != tuple(shape):
        raise UnsupportedModelError(
            f"the {patches.shape[1]} patches that images are cut into are not the rows of the "
            f"encoder of this {model_type!r}, so that their pixels cannot be told"
        )
    return rows.flatten(0, 1)
