"""What all methods over frames of videos share."""

from dataclasses import replace

import pytest
import torch

from foveate.core import get_method
from foveate.core.video import everything, together
from foveate.errors import BudgetError, InputError

METHODS = {
    "evs": {"keep": 0.5},
    "dycoke": {},
    "fastvid": {"keep": 0.5, "segments": 2},
    "holitom": {"keep": 0.5},
    "prunevid": {},
    "vidcom2": {"keep": 0.5},
    "flashvid": {"keep": 0.4, "min_segment_num": 2},
}
each = pytest.mark.parametrize("name", METHODS)


def method_of(name):
    return get_method(name)(**METHODS[name])


def scenes(videos, frames, cells, width=8):
    """Videos of three scenes, in which some places move more than others."""
    scene = torch.randn(videos, 3, cells, width)[:, torch.arange(frames) * 3 // frames]
    return scene + torch.rand(videos, 1, cells, 1) * torch.randn(videos, frames, cells, width)


def split(method, tokens):
    """Reduction of each video, and who shares it."""
    parts = method.reduce_each(tokens)
    members = [i for part, _ in parts for i in part]
    assert sorted(members) == list(range(len(tokens.index)))
    assert len({reduction.kept for _, reduction in parts}) == len(parts)
    return {i: (n, reduction) for part, reduction in parts for n, i in enumerate(part)}


@each
def test_videos_do_not_see_each_other(name, make_videos):
    x = scenes(4, 9, 20)
    attention = torch.rand(4, 1, 180)
    together = split(method_of(name), make_videos(x, received_attention=attention))
    for video in range(4):
        one = slice(video, video + 1)
        alone = make_videos(x[one], received_attention=attention[one])
        _, want = split(method_of(name), alone)[0]
        number, got = together[video]
        assert torch.equal(got.index[number], want.index[0])
        torch.testing.assert_close(
            got.apply(x.flatten(1, 2)[[m for m, (_, r) in together.items() if r is got]])[number],
            want.apply(x[one].flatten(1, 2))[0],
        )


@each
@pytest.mark.parametrize("after", [1, 3])
def test_tokens_after_the_last_frame_stay(name, after, make_videos):
    """They are not counted, change nothing else and keep their value."""
    x, attention = scenes(2, 8, 20), torch.rand(2, 1, 160)
    more = torch.full((2, 1, after), -torch.inf)
    with_them = make_videos(x, after=after, received_attention=torch.cat((attention, more), -1))
    without = split(method_of(name), make_videos(x, received_attention=attention))
    for video, (number, got) in split(method_of(name), with_them).items():
        n, want = without[video]
        last = torch.arange(160, 160 + after)
        assert torch.equal(got.index[number], torch.cat((want.index[n], last)))
        members = [v for v, (_, r) in without.items() if r is want]
        values = got.apply(with_them.x[members])[number]
        torch.testing.assert_close(values[-after:], with_them.x[video, -after:])
        torch.testing.assert_close(values[:-after], want.apply(with_them.x[members][:, :160])[n])


@each
def test_images_pass_untouched(name, make_tokens):
    ((members, reduction),) = method_of(name).reduce_each(make_tokens(images=3))
    assert list(members) == [0, 1, 2]
    assert torch.equal(reduction.index, torch.arange(24).expand(3, -1))
    assert not reduction.merges


@each
def test_missing_tokens_are_refused(name, make_videos):
    tokens = make_videos(scenes(1, 4, 6))
    for index in (tokens.index[:, 1:], tokens.index[:, :-1]):
        with pytest.raises(InputError, match="whole frames"):
            method_of(name).reduce_each(replace(tokens, index=index))


@each
@pytest.mark.parametrize(("frames", "cells"), [(2, 1), (5, 1), (2, 3), (7, 2)])
def test_tiny_videos_keep_something(name, frames, cells, make_videos):
    x = scenes(1, frames, cells)
    tokens = make_videos(x, received_attention=torch.rand(1, 1, frames * cells))
    ((_, reduction),) = method_of(name).reduce_each(tokens)
    assert 0 < reduction.kept <= frames * cells
    assert reduction.apply(tokens.x).isfinite().all()
    assert len(set(reduction.index[0].tolist())) == reduction.kept


@each
def test_double_precision_survives_alike(name, make_videos):
    x, attention = scenes(2, 9, 20), torch.rand(2, 1, 180)
    single = split(method_of(name), make_videos(x, received_attention=attention))
    tokens = make_videos(x.double(), received_attention=attention)
    for video, (number, got) in split(method_of(name), tokens).items():
        n, want = single[video]
        assert torch.equal(got.index[number], want.index[n])
        assert got.apply(tokens.x[: len(got.index)]).dtype == torch.float64


@each
def test_survivors_carry_gradients(name, make_videos):
    x = scenes(1, 6, 16).requires_grad_()
    tokens = make_videos(x, received_attention=torch.rand(1, 1, 96))
    ((_, reduction),) = method_of(name).reduce_each(tokens)
    reduction.apply(tokens.x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_parts_have_equal_counts(make_tokens):
    ((_, whole),) = everything(make_tokens(images=1))
    ((_, small),) = everything(make_tokens(grid=(2, 2), images=1))
    parts = together([whole, small, whole])
    assert [(list(members), r.kept) for members, r in parts] == [([0, 2], 24), ([1], 4)]


@each
def test_nothing_is_removed_at_one(name, make_videos):
    method = get_method(name)(**{**METHODS[name], "keep": 1.0})
    x = torch.ones(2, 8, 20, 4)
    tokens = make_videos(x, received_attention=torch.rand(2, 1, 160))
    for _, reduction in method.reduce_each(tokens):
        assert torch.equal(reduction.index, tokens.index[: len(reduction.index)])
        assert not reduction.merges


@pytest.mark.parametrize("name", ["dycoke", "prunevid"])
@pytest.mark.parametrize("keep", [0.5, 1, 64, (0.5, 0.2)])
def test_a_video_that_decides_takes_no_budget(name, keep):
    with pytest.raises(BudgetError, match="cannot be given a budget"):
        get_method(name)(keep=keep)
