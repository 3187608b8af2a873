"""Convolutions on sparse voxels, by plain index operations; no library of kernels is needed.

A convolution visits the pairs of input and output voxels of each offset of its kernel, multiplies
the inputs by the matrix of the offset, and adds the products up. It computes what a dense one does
on a grid that is 0 at absent voxels, at those outputs that exist.

Definition: Choy et al., "4D Spatio-Temporal ConvNets: Minkowski Convolutional Neural Networks",
arXiv:1904.08755, eq. 3; generative transposed convolution: Gwak et al., "Generative Sparse
Detection Networks", arXiv:2006.12356. Differs from NVIDIA/MinkowskiEngine @ 02fc608: a voxel
generated at a negative coordinate is left out, as the padding of a dense transposed convolution
leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.voxels.sparse import Pairs, SparseVoxels, keys_of, neighbours


def offsets(kernel: int) -> Tensor:
    """(kernel^3, 3) offsets of a cubic kernel: around 0 where its side is odd, else from 0 on.

    The last axis changes first, as in a dense kernel of `torch`.
    """
    line = torch.arange(kernel) - (kernel - 1) // 2
    return torch.cartesian_prod(line, line, line).view(-1, 3)


class PairConvolution(nn.Module):
    """What both convolutions share: a matrix for each offset, and a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool) -> None:
        super().__init__()
        if kernel < 1:
            raise InputError(f"kernel must be a positive number of voxels, got {kernel}")
        self.inputs, self.outputs, self.kernel = inputs, outputs, kernel
        self.weight = nn.Parameter(torch.empty(kernel**3, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=math.sqrt(2 / (inputs * kernel**3)))

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        """The voxels of `plan`, with (m, outputs) features."""
        if voxels.features.shape[1] != self.inputs:
            raise InputError(
                f"this convolution takes {self.inputs} channels, got {voxels.features.shape[1]}"
            )
        target, pairs = self.plan(voxels)
        parts = voxels.features[pairs.source].split(pairs.counts)
        products = torch.cat([x @ w for x, w in zip(parts, self.weight, strict=True)])
        made = products.new_zeros(len(target), self.outputs)
        made = made.index_add(0, pairs.target, products)
        return target.with_features(made if self.bias is None else made + self.bias)

    def plan(self, voxels: SparseVoxels) -> tuple[SparseVoxels, Pairs]:
        """The voxels of the output, without features, and the pairs; found once for some voxels."""
        raise NotImplementedError

    def flops(self, voxels: SparseVoxels) -> int:
        """FLOPs of the products: pairs x inputs x outputs x 2. The bias is left out."""
        return 2 * sum(self.plan(voxels)[1].counts) * self.inputs * self.outputs


class SparseConv(PairConvolution):
    """A convolution whose outputs are at the inputs, or at every voxel of twice the side that
    contains one.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel, in voxels of the input.
        stride: 1, or 2 for voxels of twice the side.
        bias: whether a bias is added.

    Raises:
        InputError: an argument is out of range or, in a call, channels do not fit.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel, bias)
        if stride not in (1, 2):
            raise InputError(f"stride must be 1 or 2, got {stride!r}")
        self.stride = stride

    def plan(self, voxels: SparseVoxels) -> tuple[SparseVoxels, Pairs]:
        """Outputs, and pairs of an output u and the inputs at u + offset."""

        def make() -> tuple[SparseVoxels | None, Pairs]:
            target = None if self.stride == 1 else _coarser(voxels)
            steps = offsets(self.kernel).to(voxels.keys.device) * voxels.stride
            return target, neighbours(voxels, voxels if target is None else target, steps)

        return _planned(voxels, ("conv", self.kernel, self.stride), make)


class GenerativeUpsample(PairConvolution):
    """A transposed convolution that makes voxels of half the side wherever its kernel reaches.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel, in voxels of the output; 3 makes up to 27 voxels of each.
        bias: whether a bias is added.

    Raises:
        InputError: an argument is out of range or, in a call, channels do not fit or the side of a
            voxel is odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, bias)

    def plan(self, voxels: SparseVoxels) -> tuple[SparseVoxels, Pairs]:
        """Outputs, and pairs of an output u and the inputs at u - offset."""
        if voxels.stride % 2:
            raise InputError(f"voxels of stride {voxels.stride} cannot be halved")

        def make() -> tuple[SparseVoxels | None, Pairs]:
            steps = offsets(self.kernel).to(voxels.keys.device) * (voxels.stride // 2)
            new = voxels.coordinates[:, None].repeat(1, len(steps), 1)
            new[..., 1:] += steps
            keys = keys_of(new[(new >= 0).all(-1)]).unique()
            target = _bare(keys, voxels, voxels.stride // 2)
            return target, neighbours(voxels, target, -steps)

        return _planned(voxels, ("upsample", self.kernel), make)


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation over voxels and ReLU."""
    return nn.Sequential(SparseConv(inputs, outputs, kernel, stride), NormReLU(outputs))


def up_block(inputs: int, outputs: int) -> nn.Sequential:
    """Generative upsampling, batch normalisation over voxels and ReLU."""
    return nn.Sequential(GenerativeUpsample(inputs, outputs), NormReLU(outputs))


class NormReLU(nn.Module):
    """Batch normalisation over the voxels of all scenes, and ReLU.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        """The same voxels with new features; in training, statistics are those of the batch."""
        return voxels.with_features(self.norm(voxels.features).relu())


def neighbour_mean(voxels: SparseVoxels, other: SparseVoxels) -> Tensor:
    """(m, C) mean feature of the voxels in the 3 x 3 x 3 around each of `other`; 0 where there are
    none. Both have one stride.
    """
    pairs = neighbours(voxels, other, offsets(3) * voxels.stride)
    total = voxels.features.new_zeros(len(other), voxels.features.shape[1])
    total = total.index_add(0, pairs.target, voxels.features[pairs.source])
    return total / torch.bincount(pairs.target, minlength=len(other)).clamp(min=1)[:, None]


def interpolate(voxels: SparseVoxels, other: SparseVoxels) -> Tensor:
    """(m, C) features at finer voxels: those of the eight coarse ones around, linear along each
    axis. An absent voxel counts as 0, as in MinkowskiEngine's `features_at_coordinates`.
    """
    stride = voxels.stride
    low = other.coordinates // stride * stride
    low[:, 0] = other.scenes
    share = (other.coordinates - low)[:, 1:].to(voxels.features) / stride
    made = voxels.features.new_zeros(len(other), voxels.features.shape[1])
    for corner in offsets(2).to(low.device):
        found, rows = voxels.find(keys_of(low) + keys_of(F.pad(corner * stride, (1, 0))))
        weight = torch.where(corner.bool(), share, 1 - share).prod(1) * found
        made = made + voxels.features[rows] * weight[:, None]
    return made


def _coarser(voxels: SparseVoxels) -> SparseVoxels:
    """Voxels of twice the side that contain one, without features."""
    side, coordinates = 2 * voxels.stride, voxels.coordinates.clone()
    coordinates[:, 1:] -= coordinates[:, 1:] % side
    return _bare(keys_of(coordinates).unique(), voxels, side)


def _bare(keys: Tensor, voxels: SparseVoxels, stride: int) -> SparseVoxels:
    """Voxels at some keys in the scenes of others, without features."""
    return SparseVoxels._of(keys, voxels.features.detach()[:0], stride, len(voxels.counts))


def _planned(
    voxels: SparseVoxels,
    name: tuple[object, ...],
    make: Callable[[], tuple[SparseVoxels | None, Pairs]],
) -> tuple[SparseVoxels, Pairs]:
    """The plan of that name, which every layer over the same voxels shares. It holds no voxels
    where these are the outputs themselves, or they would never be freed.
    """
    if name not in voxels._pairs:
        voxels._pairs[name] = make()
    target, pairs = voxels._pairs[name]
    return (voxels if target is None else target), pairs
