"""HoliTom outside the language model: segments, static and dynamic tokens."""

from itertools import product

import pytest
import torch

from foveate.errors import BudgetError, FoveateError
from foveate.methods.holitom import HoliTom, best_segments, run_lengths


def values(method, tokens):
    """(K, D) survivors of each video."""
    found = {}
    for members, reduction in method.reduce_each(tokens):
        merged = reduction.apply(tokens.x[torch.tensor(members)])
        found |= dict(zip(members, merged, strict=True))
    return [found[i] for i in range(len(found))]


def scenes(videos, frames, cells, width=8):
    """Videos of three scenes, in which some places move more than others."""
    scene = torch.randn(videos, 3, cells, width)[:, torch.arange(frames) * 3 // frames]
    return scene + torch.rand(videos, 1, cells, 1) * torch.randn(videos, frames, cells, width)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.9])
@pytest.mark.parametrize(("frames", "cells"), [(9, 12), (2, 5), (7, 1), (12, 20)])
def test_values_equal_a_naive_loop(keep, frames, cells, make_videos, transcribed):
    x, attention = scenes(3, frames, cells), torch.rand(3, 1, frames * cells)
    got = values(HoliTom(keep=keep), make_videos(x, received_attention=attention))
    for video, ranks, merged in zip(x, attention, got, strict=True):
        tensors = {"x": video, "received_attention": ranks.view(frames, cells)}
        want = transcribed("holitom").transcription(tensors, keep)
        torch.testing.assert_close(merged, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_segments_save_as_much_as_any_cut_does(window):
    """Against all cuts of a short video."""
    same = torch.rand(6, 5) < 0.7
    segments, saved = best_segments(run_lengths(same), window)

    def gain(first, last):
        return int(same[first:last].all(0).sum()) * (last - first)

    best = 0
    for cuts in product([False, True], repeat=6):
        edges = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), 7]
        pairs = list(zip(edges[:-1], (t - 1 for t in edges[1:]), strict=True))
        if all(last - first < window for first, last in pairs):
            best = max(best, sum(gain(*pair) for pair in pairs))
    assert saved == best == sum(gain(*pair) for pair in segments)
    assert [t for first, last in segments for t in range(first, last + 1)] == list(range(7))
    assert all(last - first < window for first, last in segments)


def test_runs_count_frames_that_resemble():
    same = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    assert run_lengths(same).tolist() == [[0, 0], [1, 0], [2, 1], [0, 2], [1, 3]]


def test_static_tokens_come_first_and_stand_in_the_first_frame(make_videos):
    """Two places stand still for three frames, two change at random."""
    still = torch.randn(1, 1, 2, 16).expand(1, 3, 2, 16)
    x = torch.cat((torch.randn(1, 3, 2, 16), still), 2)
    attention = torch.rand(1, 1, 12)
    ((_, reduction),) = HoliTom(keep=0.99).reduce_each(make_videos(x, received_attention=attention))
    assert reduction.ordered
    assert reduction.index[0].tolist() == [2, 3, 0, 1, 4, 5, 8, 9]
    assert reduction.slot[0, [2, 6, 10]].tolist() == [0, 0, 0]
    torch.testing.assert_close(reduction.apply(x.flatten(1, 2))[:, :2], still[:, 0])


def test_centers_weigh_beta(make_videos):
    """One cluster of all static tokens: the center's place counts beta, the others the rest."""
    x = torch.randn(1, 1, 5, 16).expand(1, 4, 5, 16)
    attention = torch.rand(1, 1, 20)
    ((_, reduction),) = HoliTom(keep=0.01, beta=0.7).reduce_each(
        make_videos(x, received_attention=attention)
    )
    shares = reduction.share.view(4, 5).sum(0)
    assert sorted(shares.tolist()) == pytest.approx([0.075] * 4 + [0.7])
    assert reduction.kept == 1  # rounding leaves none, but a video does not vanish
    assert shares.argmax() == reduction.index[0, 0]


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_dynamic_tokens_can_be_clustered(d, make_videos):
    """Each frame keeps some by attention, and merges all others."""
    x, attention = torch.randn(2, 3, 12, 8), torch.rand(2, 1, 36)
    ((_, reduction),) = HoliTom(keep=0.5, d=d, tau=1.0).reduce_each(
        make_videos(x, received_attention=attention)
    )
    assert reduction.kept == 18
    assert (reduction.slot >= 0).all()
    assert torch.equal(reduction.index // 12, torch.arange(3).repeat_interleave(6).expand(2, -1))
    assert torch.equal(reduction.slot.gather(1, reduction.index), torch.arange(18).expand(2, -1))
    best = attention.view(2, 3, 12).topk(round(6 * (1 - d)), dim=-1).indices.sort(-1).values
    own = reduction.index.view(2, 3, 6)[..., : best.shape[-1]]
    assert torch.equal(own, best + torch.arange(3)[:, None] * 12)
    sums = torch.zeros(2, 18).scatter_add(1, reduction.slot, reduction.share)
    torch.testing.assert_close(sums, torch.ones(2, 18))


def test_all_is_kept_at_one(make_videos):
    x = torch.randn(2, 1, 6, 8).expand(2, 5, 6, 8)
    ((_, reduction),) = HoliTom(keep=1.0).reduce_each(make_videos(x))
    assert reduction.index.tolist() == [list(range(30))] * 2
    assert not reduction.merges


def test_wrong_arguments_are_refused():
    for fields, match in (
        ({"keep": 64}, "share"),
        ({"keep": (0.5, 0.2)}, "2 entries"),
        ({"keep": 1.5}, "keep"),
    ):
        with pytest.raises(BudgetError, match=match):
            HoliTom(**fields)
    for fields in ({"beta": 1.5}, {"d": -0.1}, {"k": 0}, {"window": 0}):
        with pytest.raises(FoveateError, match="must be"):
            HoliTom(**fields)
