"""Density-peak clustering: centers, assignment, ties."""

import math

import pytest
import torch

from foveate.ops.clustering import dpc_knn, peaks, squared_distances


def naive(points, clusters, k):
    """One group, by the definition, in double precision."""
    points = points.double()
    total, width = points.shape
    far = [[float((a - b).norm()) / math.sqrt(width) for b in points] for a in points]
    density = []
    for row in far:
        near = sorted(row)[: min(k, total)]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    apart = []
    for i in range(total):
        denser = [far[i][j] for j in range(total) if density[j] > density[i]]
        apart.append(min(denser) if denser else max(map(max, far)))
    rank = [density[i] * apart[i] for i in range(total)]
    centers = sorted(range(total), key=lambda i: -rank[i])[:clusters]
    joined = [min(range(clusters), key=lambda c: far[i][centers[c]]) for i in range(total)]
    for number, center in enumerate(centers):
        joined[center] = number
    return centers, joined


@pytest.mark.parametrize(
    ("total", "clusters", "k"), [(17, 4, 4), (30, 7, 5), (8, 8, 3), (12, 1, 7)]
)
def test_clusters_equal_a_naive_loop(total, clusters, k):
    x = torch.randn(3, total, 6)
    centers, joined = dpc_knn(x, clusters, k)
    for group in range(3):
        want = naive(x[group], clusters, k)
        assert centers[group].tolist() == want[0]
        assert joined[group].tolist() == want[1]


def test_separate_groups_are_found():
    """Three heaps far apart: one center in each, and every point joins its heap's."""
    heap = torch.arange(3).repeat_interleave(8)
    x = torch.eye(3)[heap] * 9 + torch.rand(24, 3) * 0.1
    centers, joined = dpc_knn(x[None], 3, 4)
    assert sorted(heap[centers[0]].tolist()) == [0, 1, 2]
    assert torch.equal(heap[centers[0]][joined[0]], heap)


def test_groups_do_not_see_each_other():
    x = torch.randn(4, 20, 5)
    together = dpc_knn(x, 5, 4)
    for group in range(4):
        alone = dpc_knn(x[group : group + 1], 5, 4)
        assert torch.equal(alone[0], together[0][group : group + 1])
        assert torch.equal(alone[1], together[1][group : group + 1])


def test_mutual_neighbours_tie_however_the_product_is_rounded(monkeypatch):
    """With k=2 a pair that is nearest to each other has one density, so neither is the denser."""
    torch.manual_seed(0)
    product = torch.baddbmm

    def uneven(*args, **kwargs):
        exact = product(*args, **kwargs)
        return exact * (1 + 1e-7 * torch.randn_like(exact))

    monkeypatch.setattr(torch, "baddbmm", uneven)
    x = torch.randn(1, 64, 48)
    near = squared_distances(x).topk(2, dim=-1, largest=False)
    partner = near.indices[0, :, 1]
    mutual = (partner[partner] == torch.arange(64)).nonzero()[:, 0]
    assert len(mutual) > 10
    assert torch.equal(near.values[0, mutual, 1], near.values[0, partner[mutual], 1])


def test_equal_points_give_distinct_centers():
    for value in (0.0, 0.3, 1e4):
        centers, joined = dpc_knn(torch.full((2, 9, 4), value), 3, 2)
        assert centers.tolist() == [[0, 1, 2]] * 2
        assert joined[:, :3].tolist() == [[0, 1, 2]] * 2


def test_k_of_one_prefers_the_first():
    """Every density is 1 then, so every point ties."""
    centers, joined = dpc_knn(torch.randn(1, 6, 4), 1, 1)
    assert centers.tolist() == [[0]]
    assert joined.tolist() == [[0] * 6]


def test_distant_points_still_rank():
    """Densities of these points underflow to zero as numbers; as logarithms they do not."""
    x = torch.randn(1, 20, 8) * 40
    score = peaks(squared_distances(x), 4)
    assert score.isfinite().all()
    assert len(score.unique()) == 20


def test_a_common_offset_does_not_matter():
    x = torch.randn(1, 20, 8).double()
    near = squared_distances(x.float() + 1000)
    torch.testing.assert_close(near.double(), squared_distances(x), rtol=0.01, atol=1e-3)


def test_one_point():
    assert [part.tolist() for part in dpc_knn(torch.randn(1, 1, 4), 1, 3)] == [[[0]], [[0]]]


def test_half_precision_is_measured_in_float32():
    x = torch.randn(1, 12, 8).bfloat16()
    assert torch.equal(squared_distances(x), squared_distances(x.float()))
