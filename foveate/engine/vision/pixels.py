"""Pixels: what visual tokens are made of, from what an encoder is handed.

Shapes: `B` images of a batch, `N` rows of each, `G` images of a group, `K` surviving tokens of
each, `P` pixels of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.core.reduction import take_rows
from foveate.engine.vision.encoder_group import EncoderGroup
from foveate.errors import UnsupportedModelError
from foveate.families.rows import cut

if TYPE_CHECKING:
    from foveate.engine.vision.forward import Encoding


def pixels_of(encoding: Encoding, of: EncoderGroup) -> Tensor:
    """(G, K, P) pixels of a group's surviving tokens.

    Args:
        encoding: the pass.
        of: the group.

    Raises:
        UnsupportedModelError: rows of the encoder are not the patches that images are cut into.
    """
    pixels = encoding.encoder.pixels
    if pixels is None:
        whole = _of_rows(encoding)[of.rows].flatten(2)
    else:
        images = pixels(encoding.arguments, encoding.side)
        whole = torch.stack([images[number] for number in of.images.numbers])
    return take_rows(whole, of.images.index)


def _of_rows(encoding: Encoding) -> Tensor:
    """(B N, P) pixels of the rows of all images; zeros for special rows."""
    encoder = encoding.encoder
    assert encoder.cuts is not None  # as planned
    assert encoding.pixels is not None  # as then
    patches = cut(encoding.pixels, encoder.cuts).flatten(1, 2)
    rows = torch.nn.functional.pad(patches, (0, 0, encoder.leading, encoder.trailing))
    if tuple(rows.shape[:2]) != encoding.layout.shape:
        raise UnsupportedModelError(
            f"the {patches.shape[1]} patches that images are cut into are not the rows of the "
            f"encoder of this {encoding.family.model_type!r}, so that their pixels cannot be told"
        )
    return rows.flatten(0, 1)
