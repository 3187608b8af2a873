"""Sparse voxels: where they are, what they carry, and how they are found again.

Coordinates count the finest voxels, as in MinkowskiEngine (arXiv:1904.08755): at a stride of s they
are multiples of s, so that the levels of a network share one grid. Rows are in ascending order of
scene, x, y and z. A coordinate is packed into one integer, 16 bits for each axis, which makes a
search in a sorted list find a voxel and a sum find its neighbour.

Shapes: `n` voxels of all scenes together, `B` scenes, `C` channels, `K` offsets of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError

LARGEST = 2**15 - 1
"""Largest coordinate; a neighbour beyond it, or below 0, has a key that no voxel has."""
SHIFTS = (48, 32, 16, 0)
SCENES = 2**14
INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Pairs:
    """Which input voxel each output voxel of a convolution sees, for one offset after another.

    Args:
        source: (p) rows of the input, first those of offset 0.
        target: (p) rows of the output.
        counts: for each offset of the kernel, how many pairs it has; they sum to p.
    """

    source: Tensor
    target: Tensor
    counts: tuple[int, ...]


class SparseVoxels:
    """Voxels of a batch of scenes, each scene with as many as it has.

    Args:
        coordinates: (n, 4) integers in any order: scene, x, y, z. Axes count the finest voxels,
            from 0 to 32,767, and are multiples of `stride`; scenes count from 0 without a gap.
        features: (n, C) floating-point features, in the same order.
        stride: side of a voxel, in finest voxels.

    Attributes:
        coordinates: (n, 4) int64, in ascending order.
        features: (n, C) in that order.
        stride: as given.
        keys: (n) one integer for each coordinate, ascending.
        counts: (B) voxels of each scene.

    Raises:
        InputError: a shape or a dtype is wrong, a coordinate is out of range, off the grid of the
            stride or there twice, or a scene has no voxels.
    """

    def __init__(self, coordinates: Tensor, features: Tensor, stride: int = 1) -> None:
        _check_form(coordinates, features, stride)
        coordinates = coordinates.long()
        _check_values(coordinates, stride)
        keys, order = keys_of(coordinates).sort()
        if (keys[1:] == keys[:-1]).any():
            twice = coordinates_of(keys[1:][keys[1:] == keys[:-1]][:1])[0].tolist()
            raise InputError(f"voxel {twice} (scene, x, y, z) is there twice; merge its features")
        self._fill(keys, features[order], stride, int(coordinates[:, 0].max()) + 1)
        if not self.counts.all():
            empty = int((self.counts == 0).nonzero()[0])
            raise InputError(f"scene {empty} of {len(self.counts)} has no voxels; leave it out")

    def _fill(self, keys: Tensor, features: Tensor, stride: int, scenes: int) -> None:
        self.keys, self.features, self.stride = keys, features, stride
        self.coordinates = coordinates_of(keys)
        self.counts = torch.bincount(self.coordinates[:, 0], minlength=scenes)
        self._pairs: dict[tuple[object, ...], tuple[SparseVoxels | None, Pairs]] = {}

    @classmethod
    def _of(cls, keys: Tensor, features: Tensor, stride: int, scenes: int) -> SparseVoxels:
        """Voxels whose ascending keys need no check."""
        made = cls.__new__(cls)
        made._fill(keys, features, stride, scenes)
        return made

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return (
            f"SparseVoxels({len(self):,} voxels of {len(self.counts)} scenes, "
            f"{self.features.shape[1]} channels, stride {self.stride})"
        )

    @property
    def scenes(self) -> Tensor:
        """(n) the scene of each voxel."""
        return self.coordinates[:, 0]

    def with_features(self, features: Tensor) -> SparseVoxels:
        """The same voxels with other (n, C) features; what is known of neighbours is kept."""
        made = object.__new__(SparseVoxels)
        made.__dict__.update(vars(self) | {"features": features})
        return made

    def take(self, kept: Tensor) -> SparseVoxels:
        """Some of the voxels.

        Args:
            kept: (n) which ones, as booleans.
        """
        return SparseVoxels._of(self.keys[kept], self.features[kept], self.stride, len(self.counts))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of some keys.

        Args:
            keys: of any shape.

        Returns:
            Which of them are there, and the row of each; where one is not, the row means nothing.
        """
        rows = torch.searchsorted(self.keys, keys).clamp(max=len(self) - 1)
        return self.keys[rows] == keys, rows

    def at(self, other: SparseVoxels) -> Tensor:
        """(m, C) features at the voxels of `other`; 0 where there is no voxel."""
        found, rows = self.find(other.keys)
        return self.features[rows] * found[:, None]

    def padded(self) -> tuple[Tensor, Tensor]:
        """(B, N, C) features with one row for each scene, and (B, N) which of them are voxels.

        `features[mask]` takes the padding away again.
        """
        size = int(self.counts.max())
        mask = torch.arange(size, device=self.keys.device) < self.counts[:, None]
        rows = self.features.new_zeros(*mask.shape, self.features.shape[1])
        return rows.masked_scatter(mask[..., None], self.features), mask


def keys_of(coordinates: Tensor) -> Tensor:
    """One integer for each of (..., 4) coordinates, in their order; sums of coordinates have the
    sums of their keys.
    """
    scene, x, y, z = coordinates.long().unbind(-1)
    return (scene << SHIFTS[0]) + (x << SHIFTS[1]) + (y << SHIFTS[2]) + z


def coordinates_of(keys: Tensor) -> Tensor:
    """(..., 4) coordinates of keys."""
    return torch.stack([(keys >> shift) & 0xFFFF for shift in SHIFTS], -1)


def neighbours(source: SparseVoxels, target: SparseVoxels, steps: Tensor) -> Pairs:
    """Pairs of a voxel of `target` and the voxel of `source` that is a step away.

    Args:
        source: where to look.
        target: from where.
        steps: (K, 3) in finest voxels.
    """
    steps = F.pad(steps.to(target.keys), (1, 0))
    found, rows = source.find(target.keys + keys_of(steps)[:, None])
    _, targets = found.nonzero(as_tuple=True)
    return Pairs(rows[found], targets, tuple(found.sum(1).tolist()))


def _check_form(coordinates: Tensor, features: Tensor, stride: int) -> None:
    if coordinates.dtype not in INTEGERS:
        raise InputError(f"coordinates must be integers, got {coordinates.dtype}; round them first")
    if not features.is_floating_point():
        raise InputError(f"features must be floating-point numbers, got {features.dtype}")
    if coordinates.dim() != 2 or coordinates.shape[1] != 4:
        raise _shape("coordinates must be (n, 4): scene, x, y, z", coordinates.shape)
    if features.dim() != 2 or len(features) != len(coordinates):
        raise _shape(f"features must be ({len(coordinates)}, C), as coordinates", features.shape)
    if not isinstance(stride, int) or stride < 1:
        raise InputError(f"stride must be a positive integer, got {stride!r}")
    if not len(coordinates):
        raise InputError("there are no voxels; a batch needs one in each scene")


def _check_values(coordinates: Tensor, stride: int) -> None:
    low, high = int(coordinates.min()), int(coordinates[:, 1:].max())
    if low < 0 or high > LARGEST or int(coordinates[:, 0].max()) >= SCENES:
        worst = low if low < 0 else max(high, int(coordinates[:, 0].max()))
        raise InputError(
            f"coordinates must lie in 0 to {LARGEST} and scenes below {SCENES}, got {worst}; "
            "shift each scene to its smallest corner"
        )
    if (coordinates[:, 1:] % stride).any():
        raise InputError(
            f"coordinates count the finest voxels: at stride {stride} they are its multiples"
        )


def _shape(wanted: str, got: Sequence[int]) -> InputError:
    return InputError(f"{wanted}; got {tuple(got)}")
