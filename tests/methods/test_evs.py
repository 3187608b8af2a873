"""EVS: change over time, the first frame, budgets."""

from dataclasses import replace

import pytest
import torch

from foveate.core import Step
from foveate.errors import BudgetError
from foveate.methods.evs import EVS, change


def kept(method, tokens):
    """Positions of each video's survivors."""
    total = tokens.count
    quota = method.count(total, total, Step("pre_llm"), 0)
    ((_, reduction),) = method.reduce_each(replace(tokens, quota=quota))
    return reduction.index.tolist()


@pytest.mark.parametrize("keep", [9, 20, 31, 54])
def test_selection_equals_a_naive_loop(keep, make_videos, transcribed):
    x = torch.randn(3, 6, 9, 8).cumsum(1)
    got = kept(EVS(keep=keep), make_videos(x))
    for video, positions in zip(x, got, strict=True):
        assert positions == transcribed("evs").transcription({"x": video}, keep).tolist()


@pytest.mark.parametrize(("keep", "want"), [(0.3, 28), (0.1, 16), (1, 16), (0.5, 48), (1.0, 96)])
def test_the_first_frame_is_part_of_the_budget_and_always_whole(keep, want, make_videos):
    (positions,) = kept(EVS(keep=keep), make_videos(torch.randn(1, 6, 16, 8)))
    assert len(positions) == want
    assert positions[:16] == list(range(16))


def test_a_still_video_keeps_its_first_tokens(make_videos):
    """All ties: earlier tokens win, and nothing is NaN."""
    still = torch.ones(1, 5, 9, 4)  # a cosine of exactly one
    assert kept(EVS(keep=12), make_videos(still)) == [list(range(12))]
    assert kept(EVS(keep=12), make_videos(torch.zeros(1, 5, 9, 4))) == [list(range(12))]
    still[0, 3, 4] = torch.tensor([1.0, 0, 0, 0])
    (positions,) = kept(EVS(keep=11), make_videos(still))
    assert positions == [*range(9), 31, 40]  # where it changes, and where it changes back


def test_what_is_compared_is_the_frame_before(make_videos):
    """Slow drift is never dropped in favour of a frame far from the first."""
    x = torch.eye(4)[torch.tensor([[0], [1], [1], [2]])][None]  # (1, 4, 1, 4)
    assert change(x)[0, :, 0].tolist() == [torch.inf, 1, 0, 1]


def test_low_precision_is_compared_in_full(make_videos):
    x = (torch.randn(1, 4, 30, 64) * 0.02 + 1).bfloat16()
    assert kept(EVS(keep=60), make_videos(x)) == kept(EVS(keep=60), make_videos(x.float()))


def test_a_newline_counts(make_videos):
    (positions,) = kept(EVS(keep=0.5), make_videos(torch.randn(1, 6, 9, 8), after=2))
    assert len(positions) == 28
    assert positions[-2:] == [54, 55]


def test_keep_is_checked():
    with pytest.raises(BudgetError):
        EVS(keep=1.5)
