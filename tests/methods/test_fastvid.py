"""FastVID: segments, salient tokens, density peaks and what goes into them."""

import pytest
import torch

from foveate.errors import BudgetError, FoveateError
from foveate.methods.fastvid import FastVID
from foveate.ops.segments import segments_of


def values(method, tokens):
    """(K, D) survivors of each video."""
    found = {}
    for members, reduction in method.reduce_each(tokens):
        merged = reduction.apply(tokens.x[torch.tensor(members)])
        found |= dict(zip(members, merged, strict=True))
    return [found[i] for i in range(len(found))]


def scenes(videos, frames, cells, width=8):
    """Videos of three scenes."""
    scene = torch.randn(videos, 3, cells, width)[:, torch.arange(frames) * 3 // frames]
    return scene + 0.5 * torch.randn(videos, frames, cells, width)


@pytest.mark.parametrize(
    "fields", [{}, {"p": 2, "beta": 0.3, "tau": 0.7}, {"d": 1.0}, {"p": 1}, {"p": 2, "d": 0.2}]
)
@pytest.mark.parametrize(("frames", "cells", "keep"), [(9, 16, 0.4), (12, 20, 0.2), (5, 6, 0.9)])
def test_values_equal_a_naive_loop(fields, frames, cells, keep, make_videos, transcribed):
    x, attention = scenes(2, frames, cells), torch.rand(2, 1, frames * cells)
    method = FastVID(keep=keep, segments=3, **fields)
    got = values(method, make_videos(x, received_attention=attention))
    for video, ranks, merged in zip(x, attention, got, strict=True):
        tensors = {"x": video, "received_attention": ranks.view(frames, cells)}
        want = transcribed("fastvid").transcription(tensors, keep, segments=3, **fields)
        torch.testing.assert_close(merged, want.float(), rtol=1e-4, atol=1e-5)


def test_segments_end_where_frames_differ_most_and_below_tau():
    angle = torch.tensor([0.0, 0.05, 0.5, 0.55, 1.6, 1.7])
    frame = torch.stack((angle.cos(), angle.sin()), -1)
    assert segments_of(frame, 1, 0.8) == [(0, 3), (4, 5)]
    assert segments_of(frame, 3, 0.8) == [(0, 1), (2, 3), (4, 5)]
    assert segments_of(frame, 1, -1.0) == [(0, 5)]


def test_a_short_video_is_cut_into_frames():
    """The release fails here."""
    assert segments_of(torch.randn(3, 4), 8, 0.9) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("fields", "keep"), [({"p": 1}, 0.4), ({"p": 2}, 0.2)])
def test_an_anchor_with_the_peaks_of_a_single_frame_merges_its_own_frame(fields, keep, make_videos):
    """With p = 1 all do; with p = 2, where 3 frames have 1 peak each, their 2 anchors do."""
    x, attention = torch.randn(1, 3, 15, 8), torch.rand(1, 1, 45)
    method = FastVID(keep=keep, segments=1, tau=-1.0, **fields)
    ((_, reduction),) = method.reduce_each(make_videos(x, received_attention=attention))
    frame = torch.arange(45) // 15
    foreign = frame[reduction.index[0]][:, None] != frame
    assert (reduction.weights[0] > 0).sum() > reduction.kept  # peaks merge
    assert (reduction.weights[0][foreign] == 0).all()


def test_survivors_are_means(make_videos):
    """All weights of a survivor sum to one, salient ones are themselves, and order is raster."""
    x, attention = scenes(1, 12, 20), torch.rand(1, 1, 240)
    ((_, reduction),) = FastVID(keep=0.3).reduce_each(make_videos(x, received_attention=attention))
    torch.testing.assert_close(
        reduction.weights.sum(-1), torch.ones_like(reduction.weights[..., 0])
    )
    assert (reduction.index.diff(dim=-1) > 0).all()
    own = reduction.weights.gather(2, reduction.index[..., None])[0, :, 0]
    ranks = attention.view(12, 20).argsort(-1, descending=True).argsort(-1).flatten()
    salient = ranks[reduction.index[0]] < 4
    assert (own[salient] == 1).all()
    assert (own[~salient] >= 0.6).all()
    assert (own < 1).any()


def test_all_is_kept_at_one_and_something_always(make_videos):
    x, attention = scenes(1, 4, 6), torch.rand(1, 1, 24)
    tokens = make_videos(x, received_attention=attention)
    for keep in (1.0, 24, 30):
        ((_, reduction),) = FastVID(keep=keep).reduce_each(tokens)
        assert reduction.index.tolist() == [list(range(24))]
        assert not reduction.merges
    ((_, reduction),) = FastVID(keep=1).reduce_each(tokens)
    assert reduction.kept == 4  # one for each frame


def test_equal_tokens_do_not_become_nan(make_videos):
    for value in (0.0, 3.0):
        x = torch.full((1, 8, 9, 4), value)
        tokens = make_videos(x, received_attention=torch.zeros(1, 1, 72))
        ((_, reduction),) = FastVID(keep=0.5).reduce_each(tokens)
        torch.testing.assert_close(
            reduction.apply(tokens.x), x[:, :1, 0].expand(-1, reduction.kept, -1)
        )


def test_wrong_arguments_are_refused():
    for keep in (1.5, 0, (0.5, 0.2)):
        with pytest.raises(BudgetError):
            FastVID(keep=keep)
    for fields in ({"beta": 1.5}, {"d": -0.1}, {"p": 0}, {"segments": 0}):
        with pytest.raises(FoveateError, match="must be"):
            FastVID(**fields)
