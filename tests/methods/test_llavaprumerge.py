"""LLaVA-PruMerge: outliers of the class token's attention, and what is folded into them."""

import numpy as np
import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.llavaprumerge import LLaVAPruMerge


def given(images, total, seed=0, peaks=3, width=4):
    """Signals with some outliers, a number of its own for each image."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(images, total, generator=generator) * 0.01
    for image in range(images):
        chosen = torch.randperm(total, generator=generator)[: peaks + image]
        attention[image, chosen] += 0.1 + torch.rand(peaks + image, generator=generator) * 0.1
    return {
        "joint_cls_attention": attention[:, None],
        "encoder_keys": torch.randn(images, 1, 2, total, width, generator=generator),
    }


def by_hand(attention, keys, x, plus, neighbours, given_ratio=None):
    """Tokens and values of one image, with plain loops over arrays."""
    total = len(attention)
    low, high = np.quantile(attention, [0.25, 0.75])
    outliers = sum(a > high + 1.5 * (high - low) for a in attention)
    ratio = given_ratio or outliers / total
    outliers = int(total * ratio)
    ranked = sorted(range(total), key=lambda i: -attention[i])
    kept = ranked[:outliers]
    if plus:
        step = int(1 / ratio)
        grid = (
            range(0, total, max(step // 3, 1))
            if given_ratio is None
            else range(step // 2, total, step)
        )
        kept += [i for i in grid if i not in kept]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    values = []
    for i in kept:
        others = sorted((j for j in range(total) if j != i), key=lambda j: -(unit[i] @ unit[j]))
        values.append(x[i] + sum(attention[j] * x[j] for j in others[:neighbours]))
    dropped = [j for j in range(total) if j not in kept]
    if dropped:
        values.append(sum(attention[j] * x[j] for j in dropped))
    return kept, np.stack(values)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("neighbours", "ratio"), [(0, None), (3, None), (32, None), (3, 0.125)])
@pytest.mark.parametrize("grid", [(4, 6), (8, 9)])
def test_it_gives_what_a_plain_loop_gives(plus, neighbours, ratio, grid, make_tokens):
    total = grid[0] * grid[1]
    signals, x = given(4, total), torch.randn(4, total, 5)
    tokens = make_tokens(grid, images=4, x=x, **signals)
    seen = []
    method = LLaVAPruMerge(plus=plus, neighbours=neighbours, ratio=ratio)
    for members, reduction in method.reduce_each(tokens):
        assert reduction.ordered
        values = reduction.apply(x[members])
        for place, image in enumerate(members):
            seen.append(image)
            kept, expected = by_hand(
                signals["joint_cls_attention"][image, 0].double().numpy(),
                signals["encoder_keys"][image, 0].transpose(0, 1).flatten(1).double().numpy(),
                x[image].double().numpy(),
                plus,
                neighbours,
                ratio,
            )
            index = reduction.index[place].tolist()
            assert index[: len(kept)] == kept
            assert len(set(index)) == len(index) == len(expected)
            torch.testing.assert_close(
                values[place], torch.tensor(expected).float(), rtol=1e-4, atol=1e-5
            )
    assert sorted(seen) == [0, 1, 2, 3]


def test_counts_differ_between_images(make_tokens):
    parts = LLaVAPruMerge(plus=False).reduce_each(make_tokens((8, 9), images=3, **given(3, 72)))
    assert [(list(members), r.kept) for members, r in parts] == [([0], 4), ([1], 5), ([2], 6)]


def test_the_fence_lies_above_the_third_quartile_by_the_spread(make_tokens):
    """Quartiles of about 1.25 and 1.75 make a fence of about 2.5."""
    signals = given(1, 24)
    attention = torch.linspace(1, 2, 24)
    attention[[3, 9, 14]] = torch.tensor([2.9, 3.0, 2.3])
    signals["joint_cls_attention"] = attention[None, None]
    ((_, reduction),) = LLaVAPruMerge(plus=False).reduce_each(make_tokens(**signals))
    assert reduction.index[0, :-1].tolist() == [9, 3]


def test_an_image_without_outliers_keeps_its_most_attended_patch(make_tokens):
    signals = given(1, 24)
    signals["joint_cls_attention"] = torch.linspace(0, 0.1, 24)[None, None]
    ((_, reduction),) = LLaVAPruMerge(plus=False).reduce_each(make_tokens(**signals))
    assert reduction.index.tolist() == [[23, 22]]


def test_the_grid_covers_the_last_patch_but_did_not_in_the_release(make_tokens):
    signals = given(1, 25, peaks=4)
    tokens = make_tokens((5, 5), **signals)
    attention = signals["joint_cls_attention"][0, 0]
    assert attention.argsort(descending=True)[:4].tolist().count(24) == 0
    ((_, sound),) = LLaVAPruMerge().reduce_each(tokens)
    ((_, released),) = LLaVAPruMerge(as_released=True).reduce_each(tokens)
    assert set(range(0, 25, 2)) <= set(sound.index[0].tolist()[:-1])
    assert 24 not in released.index[0].tolist()[:-1]
    assert set(range(0, 24, 2)) <= set(released.index[0].tolist()[:-1])


@pytest.mark.parametrize(("outliers", "kept", "stride"), [(4, 3, 4), (2, 1, 8), (5, 5, 3)])
def test_the_released_grid_goes_by_the_share_of_outliers(outliers, kept, stride, make_tokens):
    """Which times 49 may fall just below their number, so that one of them is not kept for it."""
    signals = given(1, 49, peaks=outliers)
    best = signals["joint_cls_attention"][0, 0].argsort(descending=True)[:kept].tolist()
    ((_, reduction),) = LLaVAPruMerge(as_released=True).reduce_each(make_tokens((7, 7), **signals))
    grid = [i for i in range(0, 48, stride) if i not in best]
    assert reduction.index[0, :-1].tolist() == best + grid


def test_the_released_grid_of_two_images_goes_by_their_common_share(make_tokens):
    """Seven outliers of 72 patches: three of each image, and a stride of a third of ten."""
    signals = given(2, 36, peaks=3)
    tokens = make_tokens((6, 6), images=2, **signals)
    ((_, reduction),) = LLaVAPruMerge(as_released=True).reduce_each(tokens)
    assert set(range(0, 35, 3)) <= set(reduction.index[0].tolist())


def test_a_ratio_is_multiplied_in_double_precision(make_tokens):
    """29 % of 100 are 28.999... there, of which 28 count."""
    method = LLaVAPruMerge(plus=False, ratio=0.29)
    ((_, reduction),) = method.reduce_each(make_tokens((10, 10), **given(1, 100)))
    assert reduction.kept == int(100 * 0.29) + 1 == 29


def test_where_the_grid_is_the_whole_image_nothing_is_dropped(make_tokens):
    """With more than a sixth of outliers the stride is 1, and there is no additional token."""
    signals = given(1, 24)
    attention = torch.zeros(24)
    attention[:5] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    signals["joint_cls_attention"] = attention[None, None]
    ((_, reduction),) = LLaVAPruMerge(factor=0.0).reduce_each(make_tokens(**signals))
    assert reduction.index[0].tolist() == list(range(24))
    ((_, released),) = LLaVAPruMerge(factor=0.0, as_released=True).reduce_each(
        make_tokens(**signals)
    )
    assert released.index[0].tolist() == list(range(24))
    assert released.weights[0, 23].tolist() == [0.0] * 24  # the token for the dropped one


@pytest.mark.parametrize(("keep", "most"), [(4, 4), (0.25, 6), (2, 2), (24, 24)])
def test_keep_is_a_limit(keep, most, make_tokens):
    x = torch.randn(3, 24, 5)
    tokens = make_tokens(images=3, x=x, **given(3, 24))
    free = {i: r for members, r in LLaVAPruMerge().reduce_each(tokens) for i in members}
    for members, reduction in LLaVAPruMerge(keep=keep).reduce_each(tokens):
        for place, image in enumerate(members):
            whole = free[image].index[members_place(tokens, free, image)]
            assert reduction.kept == min(most, len(whole))
            shared = min(reduction.kept, len(whole)) - 1
            assert reduction.index[place][:shared].tolist() == whole[:shared].tolist()


def members_place(tokens, free, image):
    """Where an image is in its part."""
    return [i for i in range(3) if free[i] is free[image]].index(image)


def test_newlines_hold_nothing(make_tokens):
    signals, x = given(1, 24), torch.randn(1, 24, 5)
    signals["joint_cls_attention"][..., 5::6] = -torch.inf
    signals["encoder_keys"][..., 5::6, :] = 0
    ((_, reduction),) = LLaVAPruMerge(plus=False).reduce_each(make_tokens(x=x, **signals))
    assert reduction.weights[..., 5::6].eq(0).all()
    assert reduction.apply(x).isfinite().all()
    assert not {5, 11, 17, 23} & set(reduction.index[0].tolist())


def test_batch_equals_single(make_tokens):
    signals, x = given(3, 72), torch.randn(3, 72, 5)
    for method in (LLaVAPruMerge(), LLaVAPruMerge(plus=False)):
        parts = method.reduce_each(make_tokens((8, 9), images=3, x=x, **signals))
        for members, reduction in parts:
            values = reduction.apply(x[members])
            for place, image in enumerate(members):
                one = slice(image, image + 1)
                part = {name: signal[one] for name, signal in signals.items()}
                ((_, alone),) = method.reduce_each(make_tokens((8, 9), x=x[one], **part))
                assert torch.equal(reduction.index[place], alone.index[0])
                torch.testing.assert_close(values[place], alone.apply(x[one])[0])


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("plus", [False, True])
def test_constant_and_zero_signals_give_finite_values(grid, value, plus, make_tokens):
    total = grid[0] * grid[1]
    x = torch.ones(2, total, 5)
    signals = {
        "joint_cls_attention": torch.full((2, 1, total), value),
        "encoder_keys": torch.full((2, 1, 2, total, 4), value),
    }
    tokens = make_tokens(grid, images=2, x=x, **signals)
    ((members, reduction),) = LLaVAPruMerge(plus=plus).reduce_each(tokens)
    assert list(members) == [0, 1]
    assert reduction.index[0].unique().numel() == reduction.kept >= 1
    assert reduction.apply(x).isfinite().all()


def test_it_scores_in_the_layer_after_the_features(facts):
    def layers(**model):
        (step,) = LLaVAPruMerge().steps(facts(**model))
        assert [need.name for need in step.needs] == ["joint_cls_attention", "encoder_keys"]
        (found,) = {need.layers for need in step.needs}
        return found

    assert layers() == (23,)
    assert layers(feature_layer=23) == (23,)


def test_defaults_and_registration():
    method = get_method("llava-prumerge")()
    assert isinstance(method, LLaVAPruMerge)
    assert (method.plus, method.keep, method.neighbours, method.factor) == (True, None, 32, 1.5)
    assert method.adaptive


def test_wrong_arguments_are_refused():
    for keep in (0, 1, 1.5, (0.5, 0.25)):
        with pytest.raises(BudgetError):
            LLaVAPruMerge(keep=keep)
    with pytest.raises(FoveateError, match="neighbours"):
        LLaVAPruMerge(neighbours=-1)
    with pytest.raises(FoveateError, match="ratio"):
        LLaVAPruMerge(ratio=0.0)
    with pytest.raises(FoveateError, match="factor"):
        LLaVAPruMerge(factor=-1.0)


def test_newlines_are_merged_into_nothing_and_get_nothing(make_tokens):
    signals = given(1, 24)
    newlines = torch.zeros(24, dtype=torch.bool)
    newlines[::2] = True
    signals["joint_cls_attention"][..., newlines] = -torch.inf
    ((_, made),) = LLaVAPruMerge(neighbours=20).reduce_each(make_tokens(**signals))
    at_newlines = newlines[made.index[0, :-1]]
    assert at_newlines.any(), "no newline is on the grid, so nothing is tested"
    assert torch.equal(made.altered(24)[0, :-1], ~at_newlines)
    own = torch.nn.functional.one_hot(made.index[0], 24)
    assert not made.weights[0].masked_fill(own.bool(), 0)[:, newlines].any()


def test_images_share_a_fence_only_as_released(make_tokens):
    """What an image keeps depends on the others where the release's fence is asked for."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 1, 24, generator=generator)
    attention[1, 0, :4] += 9
    keys = torch.randn(2, 1, 1, 24, 4, generator=generator)

    def counts(method, images):
        signals = {"joint_cls_attention": attention[images], "encoder_keys": keys[images]}
        parts = method.reduce_each(make_tokens(images=len(images), **signals))
        return sorted(reduction.kept for members, reduction in parts for _ in members)

    own, shared = LLaVAPruMerge(plus=False), LLaVAPruMerge(plus=False, as_released=True)
    assert counts(own, [0, 1]) == [2, 5]
    assert counts(shared, [0, 1]) == [3, 3]
    assert counts(own, [0]) == counts(shared, [0]) == [2]
    assert counts(own, [1]) == counts(shared, [1]) == [5]
