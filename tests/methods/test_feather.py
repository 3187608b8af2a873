"""FEATHER: attention without positions, a grid at the first drop, a harder second one."""

from dataclasses import replace

import pytest
import torch

from foveate import per_request
from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods.feather import Feather
from tests.core.test_schedule import Text


def naive(attention, grid, count, stride):
    """Positions that survive in one image, on a full grid."""
    total = grid[0] * grid[1]
    score = [sum(float(head[v]) for head in attention) for v in range(total)]
    kept = set(sorted(range(total), key=lambda v: -score[v])[:count])
    for row in range(grid[0]):
        for column in range(grid[1]):
            if stride and row % stride == 0 and column % stride == 0:
                kept.add(row * grid[1] + column)
    return sorted(kept)


@pytest.mark.parametrize(("grid", "stride"), [((4, 6), 3), ((7, 7), 3), ((5, 3), 2), ((1, 9), 4)])
def test_attention_and_grid_equal_a_naive_loop(grid, stride, make_tokens):
    attention = torch.rand(5, 1, 4, grid[0] * grid[1])
    tokens = make_tokens(grid, images=5, content_attention=attention)
    parts = Feather(stride=stride).reduce_each(replace(tokens, quota=4))
    assert sorted(i for members, _ in parts for i in members) == list(range(5))
    for members, reduction in parts:
        for image, index in zip(members, reduction.index, strict=True):
            assert index.tolist() == naive(attention[image, 0], grid, 4, stride)


def test_overlap_with_the_grid_makes_counts_differ(make_tokens):
    """One image's best tokens lie on the grid, the other's do not."""
    attention = torch.zeros(2, 1, 1, 24)
    attention[0, ..., [0, 3]] = 1
    attention[1, ..., [1, 2]] = 1
    tokens = make_tokens(images=2, content_attention=attention)
    parts = Feather().reduce_each(replace(tokens, quota=2))
    assert [(list(m), r.index.tolist()) for m, r in parts] == [
        ([0], [[0, 3, 18, 21]]),
        ([1], [[0, 1, 2, 3, 18, 21]]),
    ]


def test_later_drops_protect_no_grid_token(make_tokens):
    attention = torch.zeros(1, 1, 2, 8)
    attention[..., [2, 5]] = 1
    index = torch.tensor([[0, 1, 3, 7, 9, 10, 18, 21]])
    tokens = make_tokens(index=index, content_attention=attention)
    ((_, reduction),) = Feather().reduce_each(replace(tokens, quota=2, number=1))
    assert reduction.index.tolist() == [[2, 5]]


def test_grid_is_that_of_the_image_also_when_tokens_are_gone(make_tokens):
    """The grid goes by rows and columns of the image, not by how many tokens are left."""
    index = torch.tensor([[1, 3, 4, 18, 20]])
    tokens = make_tokens(index=index, content_attention=torch.eye(5)[2].view(1, 1, 1, 5))
    ((_, reduction),) = Feather().reduce_each(replace(tokens, quota=1))
    assert reduction.index.tolist() == [[1, 2, 3]]


def test_counts_follow_the_release():
    """Of 729 tokens: int(729 q), and of what is left after the grid, int(n q²)."""
    method = Feather(keep=1 - 0.7)
    first, second = method.steps(Text())
    assert method.count(729, 729, first, 0) == 218
    for left in (299, 270, 222, 218, 12, 3):
        ratio = 1 - 0.7
        assert method.count(left, 729, second, 1) == max(1, int(left * (ratio * ratio)))


def test_without_a_grid_every_drop_keeps_the_same_share():
    method = Feather(layers=(3, 5), keep=0.25, stride=None)
    first, second = method.steps(Text())
    assert method.count(49, 49, first, 0) == 12
    assert method.count(12, 49, second, 1) == 3


def test_schedules_counts_and_requests():
    schedule = Feather(keep=(0.5, 0.1))
    first, second = schedule.steps(Text())
    assert schedule.count(100, 100, first, 0) == 50
    assert schedule.count(60, 100, second, 1) == 10
    assert Feather(keep=7).count(100, 100, second, 1) == 7
    mixed = Feather(keep=per_request([0.5, 0.2]))
    assert [mixed.count(100, 100, second, 1, row) for row in (0, 1)] == [25, 4]


def test_all_is_kept_in_place(make_tokens):
    tokens = make_tokens(images=2, content_attention=torch.rand(2, 1, 4, 24))
    ((members, reduction),) = Feather(keep=1.0).reduce_each(replace(tokens, quota=24))
    assert list(members) == [0, 1]
    assert reduction.index.tolist() == [list(range(24))] * 2


def test_equal_attention_and_one_token(make_tokens):
    tokens = make_tokens(images=2, content_attention=torch.zeros(2, 1, 4, 24))
    ((_, reduction),) = Feather(stride=None).reduce_each(replace(tokens, quota=5))
    assert (reduction.index.diff(dim=-1) > 0).all()
    one = make_tokens((1, 1), content_attention=torch.ones(1, 1, 4, 1))
    ((_, reduction),) = Feather().reduce_each(replace(one, quota=1))
    assert reduction.index.tolist() == [[0]]


def test_the_layer_before_ranks():
    steps = get_method("feather")().steps(Text())
    assert [(s.layer, s.needs[0].layers) for s in steps] == [(8, (7,)), (16, (15,))]
    windowed = Text(6, windowed=(0, 2, 4))
    assert [(s.layer, s.needs[0].layers) for s in Feather().steps(windowed)] == [
        (2, (1,)),
        (4, (3,)),
    ]


def test_wrong_arguments_are_refused():
    with pytest.raises(FoveateError, match="stride"):
        Feather(stride=0)
    with pytest.raises(LayerError, match="begin at 1"):
        Feather(layers=(0, 3))
    with pytest.raises(BudgetError, match="2 steps"):
        Feather(layers=(2, 4), keep=(0.5, 0.3, 0.1))
    with pytest.raises(BudgetError):
        Feather(keep=0.0)
