"""DyCoke: which frames are reduced, and by what."""

import pytest
import torch

from foveate.errors import FoveateError, InputError, LayerError
from foveate.methods.dycoke import DyCoke, references


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 7, 8, 11])
@pytest.mark.parametrize("k", [0.7, 0.25])
def test_selection_equals_a_naive_loop(frames, k, make_videos, transcribed):
    x = torch.randn(2, frames, 10, 8)
    ((members, reduction),) = DyCoke(k=k).reduce_each(make_videos(x))
    assert tuple(members) == (0, 1)
    for video, index in zip(x, reduction.index, strict=True):
        want = transcribed("dycoke").transcription({"x": video}, k)
        assert index.tolist() == want.tolist()


def test_every_window_is_reduced_the_last_one_too():
    assert references(10) == [0, 0, 0, 2, 4, 4, 4, 6, 8, 8]
    assert references(4) == [0, 0, 0, 2]


def test_as_released_leaves_out_the_last_window_and_an_odd_frame(make_videos):
    x = torch.randn(1, 9, 12, 8)
    ((_, reduction),) = DyCoke(as_released=True).reduce_each(make_videos(x))
    assert torch.bincount(reduction.index[0] // 12).tolist() == [12, 3, 3, 3, 12, 3, 3, 3]
    assert references(8, as_released=True) == [0, 0, 0, 2, 4, 4, 6, 6]
    with pytest.raises(InputError, match="as_released=False"):
        references(4, as_released=True)


def test_as_released_orders_a_frame_by_similarity(make_videos):
    x = torch.randn(1, 6, 10, 8)
    ((_, reduction),) = DyCoke(k=0.5, as_released=True).reduce_each(make_videos(x))
    assert reduction.ordered
    alike = torch.cosine_similarity(x[0, 1], x[0, 0], dim=-1)
    assert reduction.index[0, 10:15].tolist() == (alike.argsort()[:5] + 10).tolist()
    ((_, plain),) = DyCoke(k=0.5).reduce_each(make_videos(x))
    assert not plain.ordered


def test_nothing_and_everything_can_be_removed(make_videos, check_index):
    x = torch.randn(1, 6, 10, 8)
    for k, count in ((0.0, 60), (1.0, 20)):
        ((_, reduction),) = DyCoke(k=k).reduce_each(make_videos(x))
        check_index(reduction.index, count, 60)


def test_zero_tokens_are_like_nothing(make_videos, check_index):
    ((_, reduction),) = DyCoke(k=0.5).reduce_each(make_videos(torch.zeros(2, 4, 6, 8)))
    check_index(reduction.index, 6 + 3 * 3, 24)


def test_arguments_are_checked():
    for fields in ({"k": 1.2}, {"p": -0.1}):
        with pytest.raises(FoveateError, match="must be in"):
            DyCoke(**fields)
    with pytest.raises(LayerError, match="at least 1"):
        DyCoke(layer=0)


# -- decoding


def naive(attentions, counts, p, threshold, as_released):
    """What each step of one row sees, of (H, N) attention at each step."""
    last, chosen, steps = None, None, []
    for attention in attentions:
        now = attention[:, :counts].mean(0)
        alike = 0.0 if last is None else float(torch.cosine_similarity(now, last, dim=0))
        if last is None or alike < threshold:
            best = sorted(range(counts), key=lambda i: -float(now[i]))
            chosen = set(best[: int(counts * (1 - p))])
            steps.append(chosen)
        else:
            steps.append(set(range(counts)) if as_released else chosen)
        last = now
    return steps


@pytest.mark.parametrize("as_released", [False, True])
def test_steps_choose_as_a_naive_loop(as_released):
    """Rows of unequal counts, with steps like the one before and others."""
    counts, p = [20, 13, 0], 0.7
    real = torch.arange(20) < torch.tensor(counts)[:, None]
    base = torch.rand(3, 4, 20)
    attentions = [base, base + 0.01, torch.rand(3, 4, 20) ** 4, base, base + 0.02]
    attentions = [a.masked_fill(~real[:, None], 0.0) for a in attentions]
    method, focus = DyCoke(p=p, as_released=as_released), None
    seen = []
    for attention in attentions:
        focus = method.choose(attention, real, focus)
        assert torch.equal(focus.attention, attention.mean(1))
        assert not (focus.seen & ~real).any()
        seen.append(focus.seen)
    for row in range(2):
        want = naive([a[row] for a in attentions], counts[row], p, 0.9, as_released)
        assert [set(s[row].nonzero()[:, 0].tolist()) for s in seen] == want
    assert any(s[0].all() or s[0].sum() == 20 for s in seen) == as_released


def test_the_step_is_after_a_layer_that_sees_everything(facts):
    (drop, choose) = DyCoke().steps(facts())
    assert (drop.site, choose.site) == ("pre_llm", "decode:3")
    assert DyCoke().steps(facts(attention_layers=(5, 11)))[1].layer == 6
    assert DyCoke(layer=9).steps(facts())[1].layer == 9
    assert DyCoke(p=0.0).steps(facts()) == DyCoke(keep=1.0).steps(facts()) == (drop,)
    with pytest.raises(LayerError, match=r"p=0\.0"):
        DyCoke().steps(facts(attention_layers=(31,)))


def test_images_are_not_watched():
    assert not DyCoke().selects_from(1)
    assert DyCoke().selects_from(8)
