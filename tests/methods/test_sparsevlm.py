"""SparseVLM: raters, scores, recycling, and the corrections of version 2."""

import math
from dataclasses import replace

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods.sparsevlm import PUBLISHED, SparseVLM, rating
from tests.core.test_schedule import Text
from tests.ops.test_clustering import naive as naive_clusters


@pytest.fixture
def signals():
    """Two images of 24 tokens; the second has three text tokens after it, padded to five."""
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    relevance = torch.rand(2, 5).masked_fill(~mask, -torch.inf).softmax(-1)
    return {
        "question_relevance": relevance,
        "question_attention": torch.rand(2, 1, 4, 5, 24) * mask[:, None, None, :, None],
        "question_mask": mask,
    }


def naive_scores(relevance, attention, mask, close=None, heads=None, floor=None):
    """One image: (V) scores by the definition. `close` and `heads` are those of version 2."""
    asked = [q for q in range(len(mask)) if mask[q]]
    mean = sum(float(relevance[q]) for q in asked) / len(asked)
    raters = [q for q in asked if float(relevance[q]) > mean] or asked
    share = attention.double()
    if close is not None:
        share = share / (close if floor is None else close.clamp(min=floor))
        looking = [float(share[h, raters].sum()) for h in range(len(share))]
        best = sorted(range(len(share)), key=lambda h: -looking[h])[:heads]
        share = share[best]
    return torch.stack([share[:, q].mean(0) for q in raters]).mean(0)


def naive_recycling(x, scores, kept):
    """One image: values of the survivors, kept ones first and merged ones after them."""
    total = len(x)
    order = sorted(range(total), key=lambda v: -float(scores[v]))
    first, rest = sorted(order[:kept]), order[kept:]
    taken = rest[: int(0.3 * len(rest)) + 1]
    clusters = int(len(taken) / 10) + 1
    centers, joined = naive_clusters(x[taken], clusters, clusters)
    values = [x[v] for v in first]
    for number in range(clusters):
        members = [x[v] for v, where in zip(taken, joined, strict=True) if where == number]
        values.append(torch.stack(members).mean(0))
    return first + [taken[c] for c in centers], torch.stack(values)


def only(parts):
    ((members, reduction),) = parts
    assert list(members) == list(range(len(reduction.index)))
    return reduction


@pytest.mark.parametrize("kept", [12, 1, 20])
def test_version_1_equals_a_naive_loop(kept, make_tokens, signals):
    x = torch.randn(2, 24, 6)
    tokens = replace(make_tokens(images=2, x=x, **signals), quota=kept)
    reduction = only(SparseVLM().reduce_each(tokens))
    assert reduction.ordered
    got = reduction.apply(x)
    for i in range(2):
        scores = naive_scores(
            signals["question_relevance"][i],
            signals["question_attention"][i, 0],
            signals["question_mask"][i],
        )
        index, values = naive_recycling(x[i], scores, kept)
        assert reduction.index[i].tolist() == index
        torch.testing.assert_close(got[i], values)


def test_many_clusters_equal_a_naive_loop(make_tokens):
    """Enough tokens for several clusters, whose order and members then matter."""
    x, scores = torch.randn(1, 200, 6), torch.rand(1, 200)
    tokens = make_tokens(
        (10, 20),
        x=x,
        question_relevance=torch.ones(1, 1),
        question_attention=scores.view(1, 1, 1, 1, 200),
        question_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    reduction = only(SparseVLM().reduce_each(replace(tokens, quota=40)))
    index, values = naive_recycling(x[0], scores[0], 40)
    assert len(index) == 40 + 5
    assert reduction.index[0].tolist() == index
    torch.testing.assert_close(reduction.apply(x)[0], values)


@pytest.mark.parametrize("as_released", [False, True])
def test_version_2_equals_a_naive_loop(as_released, make_tokens, signals):
    close = torch.rand(2, 1, 5, 24) * 1.1 - 0.1
    tokens = make_tokens(images=2, question_closeness=close, **signals)
    method = SparseVLM(version=2, heads=2, as_released=as_released)
    reduction = only(method.reduce_each(replace(tokens, quota=9)))
    assert not reduction.ordered
    assert not reduction.merges
    for i in range(2):
        scores = naive_scores(
            signals["question_relevance"][i],
            signals["question_attention"][i, 0],
            signals["question_mask"][i],
            close[i, 0],
            2,
            None if as_released else 0.05,
        )
        best = sorted(range(24), key=lambda v: -float(scores[v]))[:9]
        assert reduction.index[i].tolist() == sorted(best)


def test_padding_does_not_reach_scores(make_tokens, signals):
    """Padded text has no attention, and may have a divisor of zero."""
    close = torch.rand(2, 1, 5, 24) + 0.1
    method = SparseVLM(version=2, as_released=True)
    tokens = make_tokens(images=2, question_closeness=close, **signals)
    want = only(method.reduce_each(replace(tokens, quota=9))).index
    close[1, :, 3:] = 0
    assert torch.equal(only(method.reduce_each(replace(tokens, quota=9))).index, want)


def test_heads_of_version_2_scale(make_tokens, signals):
    """14 of 32: of 4 heads, 2 count."""
    close = torch.ones(2, 1, 5, 24)
    tokens = replace(make_tokens(images=2, question_closeness=close, **signals), quota=9)
    two = only(SparseVLM(version=2, heads=2).reduce_each(tokens))
    scaled = only(SparseVLM(version=2).reduce_each(tokens))
    every = only(SparseVLM(version=2, heads=4).reduce_each(tokens))
    assert torch.equal(two.index, scaled.index)
    assert not torch.equal(two.index, every.index)


def test_rank_decides_how_many_are_kept(make_tokens):
    """Attention of rank 1 and of rank 3; with half of lambda, half of what is above stays."""
    attention = torch.rand(2, 1, 1, 5, 24)
    attention[0] = torch.rand(5, 1) * torch.rand(1, 24)
    attention[1, ..., 3:, :] = attention[1, ..., :2, :]
    given = {
        "question_relevance": torch.full((2, 5), 0.2),
        "question_attention": attention,
        "question_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    tokens = make_tokens(images=2, x=torch.randn(2, 24, 6), **given)
    method = SparseVLM(version=2, rank=1.0, positions="renumbered")
    tokens = make_tokens(images=2, question_closeness=torch.ones(2, 1, 5, 24), **given)
    tokens = replace(tokens, quota=24)
    counts = {tuple(m): r.kept for m, r in method.reduce_each(tokens)}
    assert counts == {(0,): 1, (1,): 3}
    half = SparseVLM(version=2, rank=0.5).reduce_each(tokens)
    assert {tuple(m): r.kept for m, r in half} == {(0,): 24 - 11, (1,): 24 - 10}
    limited = SparseVLM(version=2, rank=0.5, keep=13).reduce_each(replace(tokens, quota=13))
    assert [(list(m), r.kept) for m, r in limited] == [([0, 1], 13)]


@pytest.mark.parametrize("version", [1, 2])
def test_where_the_rank_is_full_the_release_drops_nothing(version, make_tokens):
    given = {
        "question_relevance": torch.full((1, 4), 0.2),
        "question_attention": torch.eye(4)[None, None, None] + 0.1,
        "question_mask": torch.ones(1, 4, dtype=torch.bool),
        "question_closeness": torch.ones(1, 1, 4, 4),
    }
    tokens = replace(make_tokens((2, 2), x=torch.randn(1, 4, 6), **given), quota=4)
    method = SparseVLM(version=version, rank=1.0, as_released=True)
    reduction = only(method.reduce_each(tokens))
    assert reduction.index.tolist() == [[0, 1, 2, 3]]
    assert not reduction.ordered


def test_raters_are_above_the_mean():
    relevance = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [0.6, 0.4, 9, 9]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    assert rating(relevance, mask).tolist() == [
        [True, False, False, False],
        [True] * 4,
        [True, False, False, False],
    ]


def test_images_do_not_see_each_other(make_tokens, signals):
    x = torch.randn(2, 24, 6)
    method = SparseVLM()
    whole = only(method.reduce_each(replace(make_tokens(images=2, x=x, **signals), quota=8)))
    for i in range(2):
        part = {name: signal[i : i + 1] for name, signal in signals.items()}
        alone = only(method.reduce_each(replace(make_tokens(x=x[i : i + 1], **part), quota=8)))
        assert torch.equal(alone.index, whole.index[i : i + 1])
        assert torch.equal(alone.slot, whole.slot[i : i + 1])


@pytest.mark.parametrize("quota", [24, 23])
def test_a_budget_that_saves_nothing_changes_nothing(quota, make_tokens, signals):
    """With one token dropped, recycling would put it back after the others."""
    tokens = replace(make_tokens(images=2, x=torch.randn(2, 24, 6), **signals), quota=quota)
    reduction = only(SparseVLM().reduce_each(tokens))
    assert reduction.index.tolist() == [list(range(24))] * 2
    assert not reduction.merges
    assert not reduction.ordered


def test_the_release_drops_one_token_at_least(make_tokens, signals):
    """And recycles it: the last in rank moves after the others."""
    x = torch.randn(2, 24, 6)
    tokens = replace(make_tokens(images=2, x=x, **signals), quota=24)
    method = SparseVLM(as_released=True)
    reduction, scores = only(method.reduce_each(tokens)), method.scores(tokens)
    assert reduction.index[:, -1].tolist() == scores.argmin(1).tolist()
    assert (reduction.index[:, :-1].diff() > 0).all()
    torch.testing.assert_close(reduction.apply(x)[0], x[0][reduction.index[0]])
    tokens = make_tokens(images=2, question_closeness=torch.ones(2, 1, 5, 24), **signals)
    tokens = replace(tokens, quota=24)
    assert only(SparseVLM(version=2, as_released=True).reduce_each(tokens)).kept == 23


@pytest.mark.parametrize("quota", [24, 23])
def test_version_2_puts_nothing_back(quota, make_tokens, signals):
    tokens = make_tokens(images=2, question_closeness=torch.ones(2, 1, 5, 24), **signals)
    reduction = only(SparseVLM(version=2).reduce_each(replace(tokens, quota=quota)))
    assert reduction.kept == quota


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("asked", [0, 3])
def test_nothing_to_go_by_is_no_nan(version, asked, make_tokens):
    x = torch.ones(1, 24, 6)
    tokens = make_tokens(
        x=x,
        question_relevance=torch.zeros(1, asked),
        question_attention=torch.zeros(1, 1, 4, asked, 24),
        question_closeness=torch.zeros(1, 1, asked, 24),
        question_mask=torch.zeros(1, asked, dtype=torch.bool),
    )
    for as_released in (False, True):
        method = SparseVLM(version=version, as_released=as_released)
        reduction = only(method.reduce_each(replace(tokens, quota=5)))
        assert reduction.apply(x).isfinite().all()
        assert len(set(reduction.index[0].tolist())) == reduction.kept
        if version == 1:
            assert reduction.index[0, :5].tolist() == [0, 1, 2, 3, 4]
    ranked = SparseVLM(version=version, rank=1.0).reduce_each(replace(tokens, quota=24))
    assert only(ranked).apply(x).isfinite().all()


def test_one_token(make_tokens):
    tokens = make_tokens(
        (1, 1),
        x=torch.ones(1, 1, 4),
        question_relevance=torch.ones(1, 2) / 2,
        question_attention=torch.ones(1, 1, 2, 2, 1),
        question_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    assert only(SparseVLM().reduce_each(replace(tokens, quota=1))).index.tolist() == [[0]]


@pytest.mark.parametrize("version", [1, 2])
def test_published_budgets(version):
    method = SparseVLM(version=version)
    steps = method.steps(Text())
    assert [s.layer for s in steps] == [3, 7, 16]
    assert [s.needs[1].layers for s in steps] == [(2,), (6,), (15,)]
    left = [method.count(576, 576, s, i) for i, s in enumerate(steps)]
    assert tuple(left) == PUBLISHED[version][192]
    assert [math.ceil(c / 2) for c in left] == [
        method.count(288, 288, s, i) for i, s in enumerate(steps)
    ]


def test_positions_are_those_of_the_version():
    class OneDimensional(Text):
        one_dimensional = True

    assert get_method("sparsevlm")().positions_on(OneDimensional()) == "renumbered"
    assert SparseVLM(version=2).positions_on(OneDimensional()) == "original"
    moved = SparseVLM(version=2, positions="renumbered")
    assert moved.positions_on(OneDimensional()) == "renumbered"


def test_rank_has_its_own_layer_and_no_budget():
    method = SparseVLM(rank=1.0)
    (step,) = method.steps(Text())
    assert (step.layer, method.count(70, 576, step, 0)) == (2, 70)


def test_wrong_arguments_are_refused():
    with pytest.raises(FoveateError, match="version"):
        SparseVLM(version=3)
    with pytest.raises(FoveateError, match="heads"):
        SparseVLM(version=2, heads=0)
    with pytest.raises(FoveateError, match="tau"):
        SparseVLM(tau=1.5)
    with pytest.raises(BudgetError, match="2 steps"):
        SparseVLM(layers=(2, 4))
    with pytest.raises(LayerError, match="begin at 1"):
        SparseVLM(layers=(0, 2, 4))
