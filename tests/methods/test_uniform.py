"""Uniform: tokens spread evenly over the grid."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.uniform import Uniform, spread_grid


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
def test_any_count_is_met_exactly(height, width, data):
    kept = data.draw(st.integers(1, height * width))
    index = spread_grid(height, width, kept)
    assert len(index) == kept
    assert (index.diff() > 0).all()
    assert index.min() >= 0
    assert index.max() < height * width


@pytest.mark.parametrize(
    ("grid", "kept", "expected"),
    [
        ((4, 4), 4, [5, 7, 13, 15]),
        ((4, 4), 1, [10]),
        ((6, 6), 9, [7, 9, 11, 19, 21, 23, 31, 33, 35]),
        ((2, 3), 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_known_patterns(grid, kept, expected, make_tokens):
    assert Uniform().reduce(make_tokens(grid), kept).index[0].tolist() == expected


@pytest.mark.parametrize("newline", [0, 1])
def test_every_frame_of_a_video_gets_its_share(newline, make_tokens):
    video = dataclasses.replace(
        make_tokens((4, 4), index=torch.arange(48 + newline)[None]), frames=3
    )
    assert Uniform().reduce(video, 3).index[0].tolist() == [10, 26, 42]
    twelve = Uniform().reduce(video, 12).index[0]
    assert (twelve // 16).bincount().tolist() == [4, 4, 4]
    assert Uniform().reduce(video, 48).index[0].tolist() == list(range(48))


@pytest.mark.parametrize("kept", [9, 36, 58, 100, 144, 300])
def test_every_quarter_of_the_image_gets_its_share(kept):
    index = spread_grid(24, 24, kept)
    quarter = 2 * (index // 24 >= 12) + (index % 24 >= 12)
    counts = quarter.bincount(minlength=4)
    side = kept**0.5
    assert (counts - kept / 4).abs().max() <= side + 1


def test_gaps_are_about_equal_both_ways():
    index = spread_grid(24, 24, 64)
    for axis in (index // 24, index % 24):
        gaps = axis.unique().diff()
        assert gaps.min() >= 2
        assert gaps.max() <= 4


def test_reduced_tokens_are_spread_by_rank(make_tokens):
    index = torch.tensor([[0, 1, 2, 3, 20, 21, 22, 23], [0, 3, 6, 9, 12, 15, 18, 21]])
    kept = Uniform().reduce(make_tokens(index=index), 4).index
    assert kept.tolist() == [[1, 3, 5, 7]] * 2


def test_batch_equals_single(make_tokens):
    together = Uniform().reduce(make_tokens(images=3), 7).index
    assert torch.equal(together, Uniform().reduce(make_tokens(), 7).index.expand(3, -1))


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (5, 7)])
def test_thin_grids_and_all_tokens(grid, make_tokens, check_index):
    total = grid[0] * grid[1]
    for kept in range(1, total + 1):
        check_index(Uniform().reduce(make_tokens(grid), kept).index, kept, total)


def test_defaults_and_registration(facts):
    method = get_method("uniform")()
    assert (method.keep, method.published_positions) == (0.25, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, step.needs) == ("pre_llm", ())


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        Uniform(keep=1.01)
    with pytest.raises(FoveateError, match="positions"):
        Uniform(positions="none")
