"""VidCom2: tokens that stand out, more of them in frames that stand out."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError
from foveate.methods.vidcom2 import VidCom2, likeness, steady_channels


def kept(method, tokens):
    """Kept positions of each video."""
    found = {}
    for members, reduction in method.reduce_each(tokens):
        found |= dict(zip(members, reduction.index.tolist(), strict=True))
    return [found[i] for i in range(len(found))]


def videos(count, frames, cells, width=16, seed=0):
    """Videos in which frames stand out a little, so that more than one gets more."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, cells, width, generator=generator)
    own = torch.randn(count, frames, cells, width, generator=generator)
    return x + torch.linspace(0.3, 0.36, frames)[:, None, None] * own + 0.5


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("frames", "cells"), [(6, 9), (3, 20), (12, 4)])
def test_it_keeps_what_a_plain_loop_keeps(frames, cells, keep, make_videos, transcribed):
    x = videos(3, frames, cells).double()
    got = kept(VidCom2(keep=keep), make_videos(x))
    for video, positions in zip(x, got, strict=True):
        wanted = transcribed("vidcom2").transcription({"x": video}, keep)
        assert positions == wanted.tolist()


def test_a_frame_that_stands_out_keeps_more():
    """The others keep less than the share, by what it gets on top of one."""
    of_video = torch.full((1, 5, 40), 4.0)
    of_video[0, 2] = 3.0
    assert VidCom2(keep=0.25).counts(of_video).tolist() == [[8, 8, 18, 8, 8]]
    assert VidCom2(keep=0.9).counts(of_video).tolist() == [[29, 29, 40, 29, 29]]
    assert VidCom2(keep=0.001).counts(of_video).tolist() == [[1] * 5]


def test_halves_round_to_even_whatever_rounding_says():
    of_video = torch.full((1, 4, 10), 4.0, dtype=torch.float64)
    for noise in (0.0, 1e-9, -1e-9):
        moved = of_video + noise * torch.arange(4)[:, None]
        assert VidCom2(keep=0.25).counts(moved).tolist() == [[2] * 4]
        assert VidCom2(keep=0.35).counts(moved).tolist() == [[4] * 4]


def test_channels_that_vary_least_are_compared():
    x = torch.randn(1, 3, 50, 4) * torch.tensor([1.0, 0.1, 3.0, 0.5])
    assert torch.equal(steady_channels(x), x[..., [1, 3]])


def test_likeness_does_not_depend_on_length_and_is_largest_at_the_center():
    x = torch.randn(2, 3, 8, 6)
    for one, other in zip(likeness(x), likeness(x * torch.rand(2, 3, 8, 1)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    of_video, of_frame = likeness(torch.ones(1, 2, 4, 6))
    torch.testing.assert_close(of_video, torch.full_like(of_video, 5.0))
    torch.testing.assert_close(of_frame, torch.full_like(of_frame, 5.0))


def test_a_still_video_keeps_its_first_tokens(make_videos):
    """All ties: earlier tokens win, and nothing is NaN."""
    for value in (0.0, 1.0):
        still = torch.full((1, 4, 8, 6), value)
        wanted = [8 * t + i for t in range(4) for i in range(2)]
        assert kept(VidCom2(), make_videos(still)) == [wanted]


def test_low_precision_is_compared_in_full(make_videos):
    x = videos(1, 5, 12).bfloat16()
    assert kept(VidCom2(), make_videos(x)) == kept(VidCom2(), make_videos(x.float()))


def test_defaults_and_registration(facts):
    method = get_method("vidcom2")()
    assert isinstance(method, VidCom2)
    assert (method.keep, method.published_positions) == (0.25, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, step.needs, step.whole, step.merges) == ("pre_llm", (), True, False)


@pytest.mark.parametrize("keep", [64, 1.5, (0.5, 0.2), None])
def test_keep_is_one_share(keep):
    with pytest.raises(BudgetError):
        VidCom2(keep=keep)
