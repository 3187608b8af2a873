"""Local Outlier Factor of numbers, for many images at once."""

import math

import pytest
import torch

from foveate.ops.outliers import local_outliers


def naive_outliers(values, neighbours, threshold=1.5):
    """The definition, one number at a time, every other number looked at."""
    total = len(values)
    k = min(neighbours, total - 1)
    if k < 1:
        return [False] * total
    near = []
    for i in range(total):
        others = sorted((abs(values[i] - values[j]), j) for j in range(total) if j != i)
        near.append(others[:k])

    def density(i):
        reach = [max(distance, near[j][-1][0]) for distance, j in near[i]]
        return 1 / (sum(reach) / k + 1e-10)

    found = []
    for i in range(total):
        around = sum(density(j) for _, j in near[i]) / k
        found.append(around / density(i) > threshold)
    return found


def sample(kind, total, seed):
    values = torch.randn(total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "attention":
        return values.softmax(0)
    if kind == "heavy":
        return (3 * values).exp()
    if kind == "duplicates":
        values[: total // 4] = values.min()
    return values


@pytest.mark.parametrize("kind", ["normal", "attention", "heavy", "duplicates"])
@pytest.mark.parametrize("total", [2, 5, 30, 90])
@pytest.mark.parametrize("neighbours", [1, 10, 20])
def test_equals_the_definition(kind, total, neighbours):
    values = torch.stack([sample(kind, total, seed) for seed in range(4)])
    wanted = [naive_outliers(row.tolist(), neighbours) for row in values]
    assert local_outliers(values, neighbours).tolist() == wanted


def test_something_is_found_on_both_sides():
    values = torch.cat((torch.linspace(0, 1, 50), torch.tensor([-5.0, 9.0])))
    assert local_outliers(values[None], 20)[0].nonzero()[:, 0].tolist() == [50, 51]


@pytest.mark.parametrize("taking_part", [0, 1, 2, 15, 40])
def test_numbers_that_take_no_part_change_nothing(taking_part):
    generator = torch.Generator().manual_seed(1)
    values = (2 * torch.randn(3, 60, generator=generator, dtype=torch.float64)).exp()
    among = torch.rand(3, 60, generator=generator).argsort(1) < taking_part
    found = local_outliers(values.masked_fill(~among, math.nan), 10, among)
    assert not found[~among].any()
    for row, mask, got in zip(values, among, found, strict=True):
        assert got[mask].tolist() == naive_outliers(row[mask].tolist(), 10)


def test_constants_have_no_outliers():
    assert not local_outliers(torch.full((2, 30), 0.25), 20).any()
    assert not local_outliers(torch.zeros(1, 1), 20).any()


def test_numbers_that_rounding_tells_apart_are_no_outliers():
    """However dense they lie, there is nothing between equal numbers."""
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 1e-7 * torch.randn(3, 30, generator=generator)
    assert not local_outliers(0.02 * noise, 5).any()
    values = torch.rand(1, 30, generator=generator)[:, torch.arange(30) // 3 * 3]
    assert torch.equal(local_outliers(values * noise, 4), local_outliers(values, 4).expand(3, -1))
