"""Sparse voxels are found again, and bad input is refused."""

import pytest
import torch
from hypothesis import given, settings

from foveate.errors import InputError
from foveate.voxels import SparseVoxels
from tests.voxels.dense import dense, voxel_sets

ROWS = [[0, 3, 1, 2], [1, 0, 0, 0], [0, 3, 1, 1]]


def test_rows_are_in_order_and_features_go_with_them():
    voxels = SparseVoxels(torch.tensor(ROWS, dtype=torch.int32), torch.arange(6.0).view(3, 2))
    assert voxels.coordinates.tolist() == [ROWS[2], ROWS[0], ROWS[1]]
    assert voxels.features.tolist() == [[4, 5], [0, 1], [2, 3]]
    assert voxels.counts.tolist() == [2, 1]


@settings(max_examples=30, deadline=None)
@given(voxel_sets())
def test_padding_is_taken_away_again(sets):
    (voxels,) = sets
    features, mask = voxels.padded()
    assert torch.equal(features[mask], voxels.features)
    assert not features[~mask].any()
    assert torch.equal(mask.sum(1), voxels.counts)


@settings(max_examples=30, deadline=None)
@given(voxel_sets(strides=(2, 2)))
def test_features_at_other_voxels_are_those_of_the_grid(sets):
    one, other = sets
    features, _ = dense(one)
    scene, x, y, z = (other.coordinates // torch.tensor([1, 2, 2, 2])).unbind(1)
    assert torch.equal(one.at(other), features.movedim(1, -1)[scene, x, y, z])


def test_a_neighbour_outside_the_axes_is_no_voxel():
    """Below 0 and beyond the largest coordinate, keys must not wrap to the next row."""
    corners = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 32767], [1, 0, 0, 0]])
    voxels = SparseVoxels(corners, torch.ones(3, 1))
    from foveate.voxels.convolution import offsets
    from foveate.voxels.sparse import neighbours

    pairs = neighbours(voxels, voxels, offsets(3))
    assert sum(pairs.counts) == 3, "each sees only itself"


@pytest.mark.parametrize(
    ("coordinates", "features", "stride", "says"),
    [
        ([[0, 1, 1, 1], [0, 1, 1, 1]], (2, 3), 1, r"\[0, 1, 1, 1\].*is there twice"),
        ([[0, 1, -1, 1]], (1, 3), 1, "lie in 0 to 32767.*got -1.*shift"),
        ([[0, 1, 40000, 1]], (1, 3), 1, "got 40000"),
        ([[1, 1, 1, 1]], (1, 3), 1, "scene 0 of 2 has no voxels"),
        ([[0, 2, 1, 2]], (1, 3), 2, "at stride 2 they are its multiples"),
        ([[0, 1, 1]], (1, 3), 1, r"must be \(n, 4\).*got \(1, 3\)"),
        ([[0, 1, 1, 1]], (2, 3), 1, r"must be \(1, C\).*got \(2, 3\)"),
        ([[0, 1, 1, 1]], (1, 3), 0, "stride must be a positive integer, got 0"),
    ],
)
def test_bad_voxels_are_refused(coordinates, features, stride, says):
    with pytest.raises(InputError, match=says):
        SparseVoxels(torch.tensor(coordinates), torch.zeros(features), stride)


def test_wrong_dtypes_and_an_empty_batch_are_refused():
    with pytest.raises(InputError, match=r"coordinates must be integers, got torch\.float32"):
        SparseVoxels(torch.zeros(1, 4), torch.zeros(1, 3))
    with pytest.raises(InputError, match="features must be floating-point"):
        SparseVoxels(torch.zeros(1, 4).int(), torch.zeros(1, 3).int())
    with pytest.raises(InputError, match="there are no voxels"):
        SparseVoxels(torch.zeros(0, 4).int(), torch.zeros(0, 3))
