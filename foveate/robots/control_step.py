"""ControlStep: what a control step of a policy saw, and what it has left for the next.

Shapes: `B` rows of the batch, `C` cameras of each, padding included, `T` tokens of the prompt, `L`
layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

NEEDED = ("input_ids", "pixel_values", "pixel_attention_mask")
"""Arguments that there is no prompt without."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What the cache of a prompt is made from.

    Args:
        ids: (B, T) tokens.
        pixels: (B, C, 3, H, W) images.
        cameras: (B, C) which of them are there.
        mask: (B, T) tokens that are no padding, if the model is told.
        positions: (B, T) of tokens, likewise.
    """

    ids: Tensor
    pixels: Tensor
    cameras: Tensor
    mask: Tensor | None
    positions: Tensor | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Observation:
        """That of a call with some arguments."""
        ids, pixels, cameras = (given[name] for name in NEEDED)
        return cls(ids, pixels, cameras, given.get("attention_mask"), given.get("position_ids"))

    def copied(self) -> Observation:
        """A copy that stays as it is when the caller writes the next image over this."""
        return Observation(*(None if x is None else x.clone() for x in self._parts))  # type: ignore[arg-type]

    def equals(self, other: Observation) -> bool:
        """Whether another one is the same in every value."""
        pairs = list(zip(self._parts, other._parts, strict=True))
        return all(map(_comparable, *zip(*pairs, strict=True))) and all(
            torch.equal(one, two) for one, two in pairs if one is not None and two is not None
        )

    def same_rows(self, other: Observation) -> Tensor | None:
        """(B) rows in which another one has the same tokens and cameras, whatever these show;
        `None` if their shapes differ.
        """
        same = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for one, two in zip(self._parts, other._parts, strict=True):
            if not _comparable(one, two):
                return None
            if one is not None and two is not None and one is not self.pixels:
                same &= (one == two).flatten(1).all(1).to(same.device)
        return same

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.pixels, self.cameras, self.mask, self.positions


@dataclass(frozen=True, eq=False)
class ControlStep:
    """A step that is over.

    Args:
        seen: what its prompt was made from.
        session: what was attached to the text model.
        cache: of the prompt alone.
        attended: (B, T) attention of the instruction, if a rule asks for it.
        entropy: (B, L) of the attention of each layer, likewise.
    """

    seen: Observation
    session: object
    cache: Cache
    attended: Tensor | None = None
    entropy: Tensor | None = None


def equal_images(before: Tensor, now: Tensor) -> Tensor:
    """(N) which of (N, 3, H, W) images are the same in every value."""
    if not _comparable(before, now):
        return torch.zeros(len(now), dtype=torch.bool, device=now.device)
    return (before == now).flatten(1).all(1)


def copied(cache: Any) -> Any:
    """A cache with layers of its own, which grow and shrink without the other's: tensors of dynamic
    layers are never written in place.
    """
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


def _comparable(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether two tensors are of one kind; or both are missing."""
    if before is None or now is None:
        return before is now
    return (before.shape, before.dtype, before.device) == (now.shape, now.dtype, now.device)
