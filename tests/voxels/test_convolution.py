"""Sparse convolutions equal dense ones on masked grids, and so do their gradients and FLOPs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from foveate.errors import InputError
from foveate.voxels import ConvolutionAccount, GenerativeUpsample, SparseConv, SparseVoxels
from foveate.voxels.convolution import block, interpolate, neighbour_mean, up_block
from tests.voxels import dense as oracle

FEW = settings(max_examples=8, deadline=None)


def shaken(module):
    """In double precision, with parameters and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.25, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
            elif "norm" in name and name.endswith("weight"):
                tensor.add_(1)  # or layer after layer would make voxels more alike
    return module


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)])
@FEW
@given(sets=oracle.voxel_sets(strides=(2,)))
def test_convolution_equals_the_dense_one(sets, kernel, stride):
    layer = shaken(SparseConv(4, 5, kernel, stride, bias=True))
    made = layer(sets[0])
    assert made.stride == 2 * stride
    oracle.assert_same(made, oracle.conv(layer, oracle.dense(sets[0])))


@pytest.mark.parametrize("kernel", [2, 3])
@FEW
@given(sets=oracle.voxel_sets(strides=(2,)))
def test_generative_upsampling_equals_the_dense_one(sets, kernel):
    layer = shaken(GenerativeUpsample(4, 5, kernel, bias=True))
    made = layer(sets[0])
    assert made.stride == 1
    oracle.assert_same(made, oracle.upsample(layer, oracle.dense(sets[0])))


@pytest.mark.parametrize("upsamples", [False, True])
@FEW
@given(sets=oracle.voxel_sets(strides=(2,)))
def test_gradients_equal_the_dense_ones(sets, upsamples):
    (voxels,) = sets
    layer = shaken(GenerativeUpsample(4, 3) if upsamples else SparseConv(4, 3, 3, 2))
    features = voxels.features.clone().requires_grad_()
    inputs = voxels.with_features(features)
    grid = oracle.dense(inputs)
    done = (oracle.upsample if upsamples else oracle.conv)(layer, grid)
    wanted = torch.autograd.grad(done[0].sin().sum(), (layer.weight, features))
    got = torch.autograd.grad(layer(inputs).features.sin().sum(), (layer.weight, features))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@FEW
@given(sets=oracle.voxel_sets(strides=(2,)))
def test_every_pair_is_counted_once(sets):
    """The account equals pairs counted one by one, and the products that torch counts."""
    model = torch.nn.Sequential(block(4, 6), up_block(6, 5)).double().eval()
    with ConvolutionAccount(model) as account, FlopCounterMode(display=False) as counted:
        model(sets[0])
    places = {tuple(row) for row in sets[0].coordinates.tolist()}
    near = list(itertools.product((-1, 0, 1), repeat=3))
    pairs = sum((b, x + 2 * i, y + 2 * j, z + 2 * k) in places
                for b, x, y, z in places for i, j, k in near)  # fmt: skip
    made = sum(min(x + i, y + j, z + k) >= 0 for _, x, y, z in places for i, j, k in near)
    assert account.flops == {"0.0": pairs * 4 * 6 * 2, "1.0": made * 6 * 5 * 2}
    assert account.total == counted.get_total_flops()
    with torch.no_grad():
        model(sets[0])
    assert account.total == counted.get_total_flops(), "nothing is counted after the block"


@FEW
@given(sets=oracle.voxel_sets(strides=(4, 1)))
def test_interpolation_is_linear_along_each_axis(sets):
    coarse, fine = sets
    got = interpolate(coarse, fine)
    at = {tuple(c): f for c, f in zip(coarse.coordinates.tolist(), coarse.features, strict=True)}
    for row, (scene, *place) in enumerate(fine.coordinates.tolist()):
        want = torch.zeros(4, dtype=torch.float64)
        for corner in itertools.product(*[(p // 4 * 4, p // 4 * 4 + 4) for p in place]):
            weights = [1 - abs(p - c) / 4 for p, c in zip(place, corner, strict=True)]
            if (scene, *corner) in at:
                want += weights[0] * weights[1] * weights[2] * at[(scene, *corner)]
        torch.testing.assert_close(got[row], want)


@FEW
@given(sets=oracle.voxel_sets(strides=(2, 2)))
def test_mean_of_neighbours_equals_the_dense_one(sets):
    voxels, other = sets
    means = oracle.masked(oracle.mean_around(oracle.dense(voxels)), oracle.dense(other)[1])
    torch.testing.assert_close(
        oracle.dense(other.with_features(neighbour_mean(voxels, other)))[0], means
    )


def test_neighbours_are_looked_up_once_for_some_voxels():
    voxels = SparseVoxels(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 2))
    one, other = SparseConv(2, 3), SparseConv(3, 4)
    assert one.plan(voxels)[1] is other.plan(one(voxels))[1]


def test_bad_layers_and_inputs_are_refused():
    voxels = SparseVoxels(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 2))
    with pytest.raises(InputError, match="takes 3 channels, got 2"):
        SparseConv(3, 3)(voxels)
    with pytest.raises(InputError, match="voxels of stride 1 cannot be halved"):
        GenerativeUpsample(2, 2)(voxels)
    with pytest.raises(InputError, match="stride must be 1 or 2, got 3"):
        SparseConv(2, 2, stride=3)
    with pytest.raises(InputError, match="kernel must be a positive number of voxels, got 0"):
        SparseConv(2, 2, 0)
