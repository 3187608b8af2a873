"""What is left of the objects of a photograph: cells, sources of merged tokens, and intervals.

Shapes: `O` objects of a photograph, `V` visual tokens, each with its cell of the grid, `K`
survivors of a step, `N` photographs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Reduction

RESAMPLES = 2000
Pair = tuple[float, float]
"""Numerator and denominator of what a photograph adds to a mean."""


class Sources:
    """Follows one image through reductions: who survives, and what it was made of."""

    def __init__(self, tokens: int) -> None:
        self._made_of = torch.eye(tokens, dtype=torch.bool)  # row p: sources of the token at p
        self._kept = torch.ones(tokens, dtype=torch.bool)

    def reduce(self, index: Tensor, reduction: Reduction, row: int = 0) -> None:
        """One step.

        Args:
            index: (G, V) positions of the tokens that it found.
            reduction: what it made of them; any weight other than 0 makes a token a source.
            row: which of the G images this is.
        """
        found = index[row if len(index) > 1 else 0]
        positions = found.gather(0, reduction.index[row])
        goes_into = (reduction.matrix(index.shape[1])[row] != 0).float()
        made_of = (goes_into @ self._made_of[found].float()) > 0
        if reduction.valid is not None:
            positions, made_of = positions[reduction.valid[row]], made_of[reduction.valid[row]]
        self._kept = torch.zeros_like(self._kept)
        self._kept[positions] = True
        self._made_of[positions] = made_of

    @property
    def kept(self) -> Tensor:
        """(V,) at which cells a survivor stands."""
        return self._kept

    @property
    def sources(self) -> Tensor:
        """(V,) which cells went into a survivor."""
        return self._made_of[self._kept].any(0)


@dataclass(frozen=True)
class Objects:
    """The objects of a photograph.

    Args:
        areas: (O, V) pixels of each object in each cell.
        small: (O,) which are small.
    """

    areas: Tensor
    small: Tensor

    def left(self, cells: Tensor) -> dict[str, Pair]:
        """What (V,) cells show of them, as numerators and denominators of means.

        Returns:
            `area`: share of the area of all objects, once for a photograph; `small`: the same of
            small objects; `lost` and `small lost`: objects of which no pixel is shown.
        """
        shown, whole = self.areas[:, cells].sum(1), self.areas.sum(1)
        small, lost = self.small, shown == 0
        return {
            "area": (_share(shown, whole), float(len(whole) > 0)),
            "small": (_share(shown[small], whole[small]), float(small.any())),
            "lost": (float(lost.sum()), float(len(lost))),
            "small lost": (float(lost[small].sum()), float(small.sum())),
        }


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if len(whole) else 0.0


def objects_of(mask: Tensor, things: Sequence[int], cell: int, least: int, small: int) -> Objects:
    """The objects that a mask shows.

    Args:
        mask: (H, W) number of the segment of each pixel.
        things: numbers of those that are objects.
        cell: side of a token's cell in pixels.
        least: pixels from which on an object counts.
        small: pixels below which it is small.
    """
    cells = mask.unflatten(0, (-1, cell)).unflatten(2, (-1, cell)).transpose(1, 2)
    flat = cells.flatten(2).flatten(0, 1)  # (V, cell * cell)
    found = [(flat == thing).sum(1) for thing in things]
    areas = torch.stack(found) if found else torch.zeros(0, len(flat), dtype=torch.long)
    areas = areas[areas.sum(1) >= least].float()
    return Objects(areas, areas.sum(1) < small)


@dataclass(frozen=True)
class Means:
    """A mean over photographs, resampled.

    Args:
        value: the mean, which is a sum of numerators over a sum of denominators.
        samples: (RESAMPLES,) the same of as many photographs drawn with replacement.
    """

    value: float
    samples: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Means:
        """Of (numerator, denominator) of each photograph; all calls of one N draw alike."""
        parts = torch.tensor(pairs, dtype=torch.float64)
        sums, total = _draws(len(parts)) @ parts, parts.sum(0)
        return cls(float(total[0] / total[1]), sums[:, 0] / sums[:, 1].clamp(min=1e-9))

    def to_dict(self) -> dict[str, float]:
        """The mean, and its 95 % interval."""
        return {"mean": self.value, **_interval(self.samples)}

    def minus(self, other: Means) -> dict[str, float]:
        """The difference to a mean over the same photographs, and its 95 % interval."""
        return {"mean": self.value - other.value, **_interval(self.samples - other.samples)}


@functools.cache
def _draws(photographs: int) -> Tensor:
    """(RESAMPLES, N) how often each is drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(photographs, (RESAMPLES, photographs), generator=generator)
    counts = torch.zeros(RESAMPLES, photographs, dtype=torch.float64)
    return counts.scatter_add(1, drawn, torch.ones_like(counts))


def _interval(samples: Tensor) -> dict[str, float]:
    bounds = torch.tensor([0.025, 0.975], dtype=samples.dtype)
    low, high = torch.quantile(samples, bounds).tolist()
    return {"low": low, "high": high}


def mean_of(pairs: Sequence[Pair]) -> Pair:
    """One pair of several seeds of the same photograph."""
    return sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
