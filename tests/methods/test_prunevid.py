"""PruneVid before the language model: scenes, static and dynamic tokens."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch

from foveate.core import VisualTokens
from foveate.errors import FoveateError, LayerError
from foveate.methods.prunevid import PruneVid, highest
from foveate.ops.segments import likeness_over_time, windows


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


@pytest.mark.parametrize(("frames", "cells"), [(12, 36), (6, 20), (3, 5), (2, 30), (16, 1)])
@pytest.mark.parametrize("tau", [0.8, 0.5])
def test_values_equal_a_naive_loop(frames, cells, tau, make_videos, transcribed):
    x = scenes(2, frames, cells)
    got = values(PruneVid(tau=tau), make_videos(x))
    for video, merged in zip(x, got, strict=True):
        want = transcribed("prunevid").transcription({"x": video}, tau=tau)
        torch.testing.assert_close(merged, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ("00100222", [5, 3]),  # a stray frame joins, and makes two runs one
        ("001113300", [2, 3, 2, 2]),  # equally long runs of a label all stay
        ("0102", [4]),  # no label has a run: one window
        ("0012", [4]),
        ("1200", [4]),
        ("001233", [4, 2]),  # two stray frames as one stretch: left wins a tie
        ("00124444", [2, 6]),
        ("5", [1]),
    ],
)
def test_windows(labels, want, transcribed):
    labels = [int(label) for label in labels]
    refined = transcribed("prunevid").refined(labels)
    assert windows(labels) == want
    assert sum(a != b for a, b in pairwise(refined)) == len(want) - 1


def test_windows_equal_a_naive_loop(transcribed):
    for _ in range(300):
        labels = torch.randint(0, 3, (12,)).tolist()
        want = [len(list(run)) for _, run in groupby(transcribed("prunevid").refined(labels))]
        assert windows(labels) == want, labels


def test_every_token_goes_somewhere(make_videos):
    """All are averaged, none is dropped; order is scene by scene, static tokens first."""
    tokens = make_videos(scenes(1, 12, 36))
    ((_, reduction),) = PruneVid().reduce_each(tokens)
    assert (reduction.slot >= 0).all()
    assert reduction.ordered
    sums = torch.zeros(1, reduction.kept).scatter_add(1, reduction.slot, reduction.share)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    own = torch.arange(reduction.kept)[None]
    assert torch.equal(reduction.slot.gather(1, reduction.index), own)


def test_a_single_frame_has_no_static_tokens():
    """The release divides by zero there."""
    assert likeness_over_time(torch.ones(1, 3, 4)).tolist() == [-torch.inf] * 3
    assert likeness_over_time(torch.ones(2, 3, 4)).tolist() == pytest.approx([1] * 3)


def test_equal_tokens_do_not_become_nan(make_videos):
    for value in (0.0, 3.0):
        x = torch.full((1, 8, 20, 4), value)
        (merged,) = values(PruneVid(), make_videos(x))
        torch.testing.assert_close(merged, torch.full_like(merged, value))


def test_wrong_arguments_are_refused():
    for fields in ({"frame_ratio": 1.5}, {"cluster_ratio": -0.1}, {"alpha": 2.0}, {"k": 0}):
        with pytest.raises(FoveateError, match="must be"):
            PruneVid(**fields)
    with pytest.raises(LayerError, match="at least 1"):
        PruneVid(layer=0)


# -- inside the language model


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_highest_of_each_set_stay(share):
    """Against a loop over sets; labels in any order, ties to the lower index."""
    scores = torch.randint(0, 5, (3, 40)) / 4
    label = torch.randint(-1, 4, (3, 40))
    kept = highest(scores, label, share)
    for image in range(3):
        want = set((label[image] == -1).nonzero()[:, 0].tolist())
        for number in range(4):
            members = (label[image] == number).nonzero()[:, 0].tolist()
            best = sorted(members, key=lambda i: -float(scores[image, i]))
            want |= set(best[: int(share * len(members))])
        assert kept[image].nonzero()[:, 0].tolist() == sorted(want)


def test_each_scene_and_frame_has_its_quota(make_videos):
    """From merging to the cut: labels count scenes' static tokens and frames' dynamic ones."""
    tokens = make_videos(scenes(2, 12, 36), after=1)
    found = PruneVid(alpha=0.5).reduce_each(tokens)
    for members, reduction in found:
        for number in range(len(members)):
            label, index = reduction.label[number], reduction.index[number]
            assert label[-1] == -1
            assert (label[:-1].diff() >= 0).all()
            for one in label[:-1].unique():  # a set lies in one frame: static ones in its first
                frames = index[label == one] // 36
                assert (frames == frames[0]).all()
        attention = torch.rand(len(members), 1, 2, 3, reduction.kept)
        inside = replace(
            tokens,
            index=tokens.index[list(members)].gather(1, reduction.index),
            signals={"question_attention": attention},
            label=reduction.label,
            site="llm:3",
        )
        scores = attention.amax((1, 2, 3))
        parts = PruneVid(alpha=0.5).reduce_each(inside)
        assert sorted(i for part, _ in parts for i in part) == list(range(len(members)))
        for part, cut in parts:
            for n, image in enumerate(part):
                want = highest(scores[[image]], reduction.label[[image]], 0.5)[0]
                assert cut.index[n].tolist() == want.nonzero()[:, 0].tolist()
                assert cut.index[n, -1] == reduction.kept - 1


def test_images_pass_the_cut(make_tokens):
    tokens = replace(make_tokens(images=2), site="llm:3")
    ((_, reduction),) = PruneVid().reduce_each(tokens)
    assert torch.equal(reduction.index, torch.arange(24).expand(2, -1))


def test_the_cut_is_after_a_layer_that_can_rank(facts):
    def layer(**fields):
        return PruneVid().steps(facts(**fields))[1].layer

    assert layer() == 11
    assert layer(text_layers=28, attention_layers=tuple(range(28))) == 10
    assert layer(attention_layers=(5, 11, 17, 23, 29)) == 12
    assert layer(text_layers=2, attention_layers=(0, 1)) == 1
    assert layer(first_llm_layer=14) == 14
    (merge, cut) = PruneVid(layer=4).steps(facts())
    assert cut.needs[0].layers == (3,)
    assert cut.effects == ("keep_positions", "evict_cache")
    assert PruneVid(alpha=1.0).steps(facts()) == (merge,)
    with pytest.raises(LayerError, match=r"alpha=1\.0"):
        layer(attention_layers=(31,))


def test_a_video_of_few_tokens_keeps_its_best_one():
    """An earlier method may leave so few that every share of them is truncated to none."""
    attention = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.1, 0.2]])
    tokens = VisualTokens(
        features=lambda: torch.zeros(2, 3, 4),
        index=torch.arange(3).expand(2, -1),
        grid=(1, 3),
        site="llm:2",
        signals={"question_attention": attention[:, None, None, None]},
        label=torch.arange(3).expand(2, -1),
    )
    parts = PruneVid(alpha=0.4).reduce_each(tokens)
    kept = {
        m: index.tolist() for members, r in parts for m, index in zip(members, r.index, strict=True)
    }
    assert kept == {0: [1], 1: [0]}
