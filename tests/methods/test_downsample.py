"""Downsample: average pooling of the token grid."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import VisualTokens, get_method
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.methods.downsample import Downsample, pooled_grid


def pooled_by_torch(x, grid, cells):
    """(G, V, D) through torch's adaptive pooling of images."""
    images = x.mT.reshape(len(x), x.shape[-1], *grid)
    return F.adaptive_avg_pool2d(images, cells).flatten(2).mT


@pytest.mark.parametrize(
    ("grid", "kept", "cells"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 58, (7, 8)),
        ((24, 24), 29, (5, 5)),
        ((24, 24), 576, (24, 24)),
        ((24, 24), 575, (23, 24)),
        ((24, 24), 2, (1, 2)),
        ((24, 24), 1, (1, 1)),
        ((10, 30), 75, (5, 15)),
        ((1, 9), 4, (1, 4)),
        ((9, 1), 4, (4, 1)),
    ],
)
def test_grid_is_the_largest_of_the_right_shape(grid, kept, cells):
    assert pooled_grid(*grid, kept) == cells


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 24), width=st.integers(1, 24), data=st.data())
def test_values_are_torchs_adaptive_pooling(height, width, data):
    kept = data.draw(st.integers(1, height * width))
    x = torch.randn(2, height * width, 3)
    tokens = tokens_on((height, width), x)
    reduction = Downsample().reduce(tokens, kept)
    cells = pooled_grid(height, width, kept)
    assert reduction.kept == cells[0] * cells[1] <= kept
    torch.testing.assert_close(reduction.apply(x), pooled_by_torch(x, (height, width), cells))
    assert reduction.index.shape == (2, reduction.kept)
    assert (reduction.index.diff(dim=-1) > 0).all()
    assert reduction.index.min() >= 0
    assert reduction.index.max() < height * width


def tokens_on(grid, x, frames=1):
    index = torch.arange(x.shape[1]).expand(len(x), -1)
    return VisualTokens(lambda: x, index, grid, frames=frames)


@pytest.mark.parametrize(
    ("kept", "frames", "cells"),
    [(15, 3, (1, 5)), (12, 3, (1, 4)), (11, 3, (1, 3)), (3, 3, (1, 1)), (2, 2, (1, 1))],
)
@pytest.mark.parametrize("newline", [0, 1])
def test_frames_of_a_video_are_pooled_alike(kept, frames, cells, newline):
    """Three frames of 2 x 5; a newline after them keeps its value, and costs one token."""
    x = torch.randn(2, 30 + newline, 4)
    reduction = Downsample().reduce(tokens_on((2, 5), x, 3), kept + newline)
    video = x[:, :30].mT.reshape(2, 4, 3, 2, 5)
    pooled = F.adaptive_avg_pool3d(video, (frames, *cells)).flatten(2).mT
    torch.testing.assert_close(reduction.apply(x), torch.cat((pooled, x[:, 30:]), 1))
    assert (reduction.index.diff(dim=-1) > 0).all()
    if frames == 3:
        per_frame = (reduction.index[0, : reduction.kept - newline] // 10).bincount()
        assert per_frame.tolist() == [cells[0] * cells[1]] * 3


def test_one_token_of_a_video_with_a_newline_shows_its_frames():
    x = torch.randn(1, 31, 4)
    reduction = Downsample().reduce(tokens_on((2, 5), x, 3), 1)
    torch.testing.assert_close(reduction.apply(x), x[:, :30].mean(1, keepdim=True))


def test_index_is_the_token_at_the_centre_of_each_cell(make_tokens):
    reduction = Downsample().reduce(make_tokens((6, 9)), 6)
    assert reduction.index[0].tolist() == [10, 13, 16, 37, 40, 43]
    assert torch.equal((reduction.weights[0] > 0).sum(-1), torch.full((6,), 9))
    assert (reduction.weights[0].gather(1, reduction.index[0][:, None]) > 0).all()


def test_constant_features_stay_constant(make_tokens):
    reduction = Downsample().reduce(make_tokens((5, 7)), 11)
    out = reduction.apply(torch.full((1, 35, 4), 2.5))
    torch.testing.assert_close(out, torch.full_like(out, 2.5))


def test_all_tokens_keep_their_own_values(make_tokens):
    reduction = Downsample().reduce(make_tokens((4, 6), images=2), 24)
    assert reduction.weights is None
    assert reduction.index.tolist() == [list(range(24))] * 2


def test_one_token(make_tokens):
    assert Downsample().reduce(make_tokens((1, 1)), 1).index.tolist() == [[0]]


def test_batch_equals_single(make_tokens):
    x = torch.randn(3, 24, 4)
    together = Downsample().reduce(make_tokens(images=3), 6).apply(x)
    for image in range(3):
        alone = Downsample().reduce(make_tokens(), 6).apply(x[image : image + 1])
        torch.testing.assert_close(together[image : image + 1], alone)


def test_grid_with_holes_is_refused(make_tokens):
    tokens = make_tokens((4, 6), index=torch.arange(0, 24, 2)[None])
    with pytest.raises(InputError, match=r"12 tokens are left of its 24"):
        Downsample().reduce(tokens, 6)


def test_a_newline_does_not_stand_in_for_a_missing_cell(make_tokens):
    index = torch.tensor([[0, 1, 2, 4]])
    with pytest.raises(InputError, match=r"whole 2 x 2 token grid"):
        Downsample().reduce(make_tokens((2, 2), index=index), 2)


def test_defaults_and_registration(facts):
    method = get_method("downsample")()
    assert (method.keep, method.published_positions) == (0.25, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, step.needs) == ("pre_llm", ())


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        Downsample(keep="half")
    with pytest.raises(FoveateError, match="positions"):
        Downsample(positions="none")
