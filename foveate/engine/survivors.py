"""Survivors: which visual tokens of the language model survive the encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.engine.vision.forward import Encoding
from foveate.errors import UnsupportedModelError
from foveate.families import Family


def survivors(
    family: Family,
    modality: str,
    passes: Sequence[Encoding],
    lengths: Sequence[int],
    arguments: Mapping[str, Any],
) -> dict[str, Sequence[Tensor]]:
    """Entry of each step -> (K) positions of each image's visual tokens that survive it,
    ascending.

    Args:
        family: the model.
        modality: `image` or `video`.
        passes: passes through the encoder.
        lengths: visual tokens that the language model is given of each image.
        arguments: what the features were made from.

    Raises:
        UnsupportedModelError: they do not follow from the encoder's.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for encoding in passes:
        for shape, kept in encoding.survivors():
            for entry, index in kept.items():
                survives = torch.zeros(shape.total, dtype=torch.bool, device=index.device)
                found[entry].append(survives.index_fill(0, index, True))
    result: dict[str, Sequence[Tensor]] = {}
    for entry, images in found.items():
        tokens = torch.cat(list(family.follow(modality, images, arguments)))
        if len(tokens) != sum(lengths):
            raise UnsupportedModelError(
                f"the encoder of this {family.model_type} saw {len(images)} images of "
                f"{len(tokens)} visual tokens, but the language model is given {sum(lengths)}, so "
                "that what was removed inside the encoder cannot be followed; use a pre_llm or "
                "llm method"
            )
        result[entry] = [of.nonzero()[:, 0] for of in tokens.split(list(lengths))]
    return result
