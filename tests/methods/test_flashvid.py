"""FlashVID: selected tokens, trees through frames, clusters of what is left, and a later cut."""

from dataclasses import replace

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.flashvid import FlashVID


def values(method, tokens):
    """(K, D) survivors of each video."""
    found = {}
    for members, reduction in method.reduce_each(tokens):
        merged = reduction.apply(tokens.x[torch.tensor(members)])
        found |= dict(zip(members, merged, strict=True))
    return [found[i] for i in range(len(found))]


def scenes(videos, frames, cells, width=16, noise=0.4, seed=0):
    """Videos of three scenes, around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(videos, 3, cells, width, generator=generator) + 0.5
    own = torch.randn(videos, frames, cells, width, generator=generator)
    return scene[:, torch.arange(frames) * 3 // frames] + noise * own


def attention(videos, frames, cells, seed=1):
    return torch.rand(videos, 1, frames * cells, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fields", [{}, {"alpha": 0.3}, {"temporal_threshold": 0.5}, {"alpha": 0.0}, {"alpha": 1.0}]
)
@pytest.mark.parametrize("least", [1, 3, 99])
@pytest.mark.parametrize(("frames", "cells", "keep"), [(9, 16, 0.5), (6, 20, 0.4), (2, 12, 0.6)])
def test_values_equal_a_naive_loop(fields, least, frames, cells, keep, make_videos, transcribed):
    """Whole videos as one segment, a few segments, and each frame as its own."""
    x, seen = scenes(2, frames, cells).double(), attention(2, frames, cells).double()
    method = FlashVID(keep=keep, segment_threshold=0.3, min_segment_num=least, **fields)
    got = values(method, make_videos(x, received_attention=seen))
    names = {"alpha": "alpha", "temporal_threshold": "threshold"}
    given = {names[name]: value for name, value in fields.items()}
    for video, ranks, merged in zip(x, seen, got, strict=True):
        tensors = {"x": video, "received_attention": ranks.view(frames, cells)}
        want = transcribed("flashvid").transcription(
            tensors, keep, tau=0.3, segments=least, **given
        )
        torch.testing.assert_close(merged, want.to(merged), rtol=1e-4, atol=1e-5)


def still(make_videos, frames=4, noise=0.01):
    """A video in which nothing happens, so that trees span all frames."""
    x = scenes(1, frames, 8, noise=noise)[:, :1] * torch.linspace(1, 2, frames)[:, None, None]
    return make_videos(x, received_attention=attention(1, frames, 8))


def test_a_tree_is_the_mean_of_its_tokens_and_was_not_as_released(make_videos):
    """Four frames merge into the first: a sum of four, over the root and the one that joins it."""
    tokens = still(make_videos)
    fields = {"keep": 0.15, "alpha": 0.0, "min_segment_num": 1, "temporal_threshold": 0.999}
    for as_released, total in ((False, 1.0), (True, 2.0)):
        ((_, reduction),) = FlashVID(**fields, as_released=as_released).reduce_each(tokens)
        weights = reduction.matrix(32)[0].sum(-1)
        torch.testing.assert_close(weights.amax(), torch.tensor(total))


def test_merged_tokens_are_means(make_videos):
    """All weights of a survivor sum to one, selected ones are themselves, and order is raster."""
    x, seen = scenes(1, 9, 16), attention(1, 9, 16)
    ((_, reduction),) = FlashVID(keep=0.4, min_segment_num=2, segment_threshold=0.1).reduce_each(
        make_videos(x, received_attention=seen)
    )
    weights = reduction.matrix(144)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (reduction.index.diff(dim=-1) > 0).all()
    own = weights.gather(2, reduction.index[..., None])[0, :, 0]
    assert (own == 1).sum() >= 9 * 6  # of a budget of 8 a frame
    assert (own < 1).any()


def test_a_selected_token_is_selected_once(make_videos):
    """Where all others have less than its own distance of zero, as with negative relevance."""
    x = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    x[..., 1:, :] = -x[..., :1, :] + 0.1 * x[..., 1:, :]  # against the mean of the frame
    tokens = make_videos(x, received_attention=attention(1, 4, 12))
    ((_, reduction),) = FlashVID(keep=0.6, alpha=1.0).reduce_each(tokens)
    assert reduction.kept == 4 * 9
    assert len(set(reduction.index[0].tolist())) == reduction.kept


def test_the_budget_is_met_where_everything_is_alike(make_videos):
    """Not all that resemble the frame before merge, so that as many are left as asked for."""
    ((_, reduction),) = FlashVID(keep=0.4, min_segment_num=1).reduce_each(still(make_videos))
    assert 4 * 4 <= reduction.kept <= 4 * 4 + 3  # rounded up in each frame


def test_the_cut_inside_the_model(make_videos, make_tokens):
    """30 % of what is left, rounded up, by attention of the last prompt token; images pass."""
    seen = torch.rand(2, 1, 4, 21, generator=torch.Generator().manual_seed(0))
    tokens = replace(make_videos(scenes(2, 3, 7), text_attention=seen), site="llm:20", quota=0)
    ((members, reduction),) = FlashVID().reduce_each(tokens)
    assert (members, reduction.kept, reduction.merges) == ((0, 1), 7, False)
    for index, ranks in zip(reduction.index, seen[:, 0].mean(1), strict=True):
        assert index.tolist() == sorted(sorted(range(21), key=lambda i: -ranks[i])[:7])
    image = replace(make_tokens(text_attention=seen), site="llm:20")
    ((_, whole),) = FlashVID().reduce_each(image)
    assert whole.kept == 24


def test_steps_follow_the_depth_of_the_model(facts):
    merge, cut = FlashVID().steps(facts(text_layers=28, attention_layers=tuple(range(28))))
    assert (merge.site, merge.whole, merge.merges) == ("pre_llm", True, True)
    assert (cut.site, cut.effects) == ("llm:20", ("keep_positions",))
    assert [(n.name, n.layers) for n in cut.needs] == [("text_attention", (19,))]
    assert FlashVID().steps(facts())[1].layer == 23
    assert FlashVID(pruning_layer=5).steps(facts())[1].layer == 5
    for whole in (FlashVID(llm_keep=1.0), FlashVID(keep=1.0)):
        assert len(whole.steps(facts())) == 1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_tokens_do_not_become_nan(value, make_videos):
    x = torch.full((1, 8, 9, 4), value)
    for seen in (torch.zeros(1, 1, 72), attention(1, 8, 9)):
        tokens = make_videos(x, received_attention=seen)
        ((_, reduction),) = FlashVID(min_segment_num=2).reduce_each(tokens)
        torch.testing.assert_close(
            reduction.apply(tokens.x), x[:, :1, 0].expand(-1, reduction.kept, -1)
        )


def test_defaults_and_registration():
    method = get_method("flashvid")()
    assert isinstance(method, FlashVID)
    assert (method.keep, method.alpha, method.expansion, method.llm_keep) == (0.25, 0.7, 1.25, 0.3)


def test_wrong_arguments_are_refused():
    for keep in (64, 1.5, (0.5, 0.2), None):
        with pytest.raises(BudgetError):
            FlashVID(keep=keep)
    for fields in ({"alpha": 1.5}, {"temporal_threshold": -2.0}, {"min_segment_num": 0}):
        with pytest.raises(FoveateError, match="must be"):
            FlashVID(**fields)
