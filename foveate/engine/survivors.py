"""Survivors: which visual tokens of the language model survive the encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.transfer import download
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
    seen, kept = _seen(passes)
    if type(family).follow is Family.follow and all(of == list(lengths) for of in seen.values()):
        return dict(kept)  # they are what the encoder has left
    found: dict[str, Sequence[Tensor]] = {}
    read = iter(download([index for of in kept.values() for index in of]))
    for entry, totals in seen.items():
        images = [
            torch.zeros(total, dtype=torch.bool).index_fill(0, next(read), True) for total in totals
        ]
        tokens = torch.cat(list(family.follow(modality, images, arguments)))
        if len(tokens) != sum(lengths):
            raise UnsupportedModelError(
                f"the encoder of this {family.model_type} saw {len(images)} images of "
                f"{len(tokens)} visual tokens, but the language model is given {sum(lengths)}, so "
                "that what was removed inside the encoder cannot be followed; use a pre_llm or "
                "llm method"
            )
        found[entry] = [of.nonzero()[:, 0] for of in tokens.split(list(lengths))]
    return found


def _seen(passes: Sequence[Encoding]) -> tuple[dict[str, list[int]], dict[str, list[Tensor]]]:
    """Entry of each step -> tokens of each image that the encoder saw, and (K) which survive it."""
    seen: dict[str, list[int]] = defaultdict(list)
    kept: dict[str, list[Tensor]] = defaultdict(list)
    for encoding in passes:
        for shape, of_image in encoding.survivors():
            for entry, index in of_image.items():
                seen[entry].append(shape.total)
                kept[entry].append(index)
    return seen, kept
