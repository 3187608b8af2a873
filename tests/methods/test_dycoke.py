"""DyCoke: which frames are reduced, and by what."""

import pytest
import torch

from foveate.errors import FoveateError, InputError
from foveate.methods.dycoke import DyCoke, references


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 7, 8, 11])
@pytest.mark.parametrize("k", [0.7, 0.25])
def test_selection_equals_a_naive_loop(frames, k, make_videos, transcribed):
    x = torch.randn(2, frames, 10, 8)
    ((members, reduction),) = DyCoke(k=k).split(make_videos(x))
    assert tuple(members) == (0, 1)
    for video, index in zip(x, reduction.index, strict=True):
        want = transcribed("dycoke").transcription({"x": video}, k)
        assert index.tolist() == want.tolist()


def test_every_window_is_reduced_the_last_one_too():
    assert references(10) == [0, 0, 0, 2, 4, 4, 4, 6, 8, 8]
    assert references(4) == [0, 0, 0, 2]


def test_as_released_leaves_out_the_last_window_and_an_odd_frame(make_videos):
    x = torch.randn(1, 9, 12, 8)
    ((_, reduction),) = DyCoke(as_released=True).split(make_videos(x))
    assert torch.bincount(reduction.index[0] // 12).tolist() == [12, 3, 3, 3, 12, 3, 3, 3]
    assert references(8, as_released=True) == [0, 0, 0, 2, 4, 4, 6, 6]
    with pytest.raises(InputError, match="as_released=False"):
        references(4, as_released=True)


def test_as_released_orders_a_frame_by_similarity(make_videos):
    x = torch.randn(1, 6, 10, 8)
    ((_, reduction),) = DyCoke(k=0.5, as_released=True).split(make_videos(x))
    assert reduction.ordered
    alike = torch.cosine_similarity(x[0, 1], x[0, 0], dim=-1)
    assert reduction.index[0, 10:15].tolist() == (alike.argsort()[:5] + 10).tolist()
    ((_, plain),) = DyCoke(k=0.5).split(make_videos(x))
    assert not plain.ordered


def test_nothing_and_everything_can_be_removed(make_videos, check_index):
    x = torch.randn(1, 6, 10, 8)
    for k, count in ((0.0, 60), (1.0, 20)):
        ((_, reduction),) = DyCoke(k=k).split(make_videos(x))
        check_index(reduction.index, count, 60)


def test_zero_tokens_are_like_nothing(make_videos, check_index):
    ((_, reduction),) = DyCoke(k=0.5).split(make_videos(torch.zeros(2, 4, 6, 8)))
    check_index(reduction.index, 6 + 3 * 3, 24)


def test_shares_are_checked():
    with pytest.raises(FoveateError, match="k must be in"):
        DyCoke(k=1.2)
