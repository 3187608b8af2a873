"""Laws of reductions, in each of their four storage forms."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from foveate.core import Reduction

FORMS = ("gather", "segments", "dense")
ALL_FORMS = (*FORMS, "residual")  # with one, constants do not stay what they are


def make(form, images, tokens, kept, seed, drops=0):
    """A random reduction; `drops` of the tokens go nowhere (only segments and gathers drop)."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(tokens, generator=generator) for _ in range(images)]
    index = torch.stack([order[:kept] for order in orders])
    if form == "gather":
        return Reduction(index.sort(-1).values)
    if form == "dense":
        weights = torch.rand(images, kept, tokens, generator=generator) + 0.01
        return Reduction(index.sort(-1).values, weights / weights.sum(-1, keepdim=True))
    if form == "residual":
        propagated = min(drops + 1, tokens - kept)
        removed = torch.stack([order[kept:][:propagated] for order in orders])
        residual = torch.randn(images, kept, propagated, generator=generator)
        mass = torch.rand(images, kept, generator=generator) + 0.5
        return Reduction(index.sort(-1).values, removed=removed, residual=residual, mass=mass)
    slot = torch.randint(0, kept, (images, tokens), generator=generator)
    for image, order in enumerate(orders):
        gone = order[kept:][: min(drops, tokens - kept)]
        slot[image, gone] = -1
        slot[image, index[image]] = torch.arange(kept)
    mass = torch.rand(images, tokens, generator=generator) + 0.1
    return Reduction.mean(index, slot, mass)


@st.composite
def cases(draw, forms=FORMS):
    tokens = draw(st.integers(2, 12))
    kept = draw(st.integers(1, tokens))
    return {
        "form": draw(st.sampled_from(forms)), "images": draw(st.integers(1, 3)), "tokens": tokens,
        "kept": kept, "seed": draw(st.integers(0, 999)), "drops": draw(st.integers(0, 3)),
    }  # fmt: skip


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(cases(ALL_FORMS))
def test_apply_is_the_matrix(case):
    reduction, tokens = make(**case), case["tokens"]
    x = torch.randn(case["images"], tokens, 5)
    close(reduction.apply(x), reduction.matrix(tokens) @ x)
    assert reduction.apply(x).shape[1] == reduction.kept == case["kept"]


@settings(max_examples=120, deadline=None)
@given(cases(ALL_FORMS), st.sampled_from(ALL_FORMS), st.data())
def test_composition_is_the_matrix_product(case, form, data):
    first, tokens = make(**case), case["tokens"]
    kept = data.draw(st.integers(1, case["kept"]))
    second = make(form, case["images"], case["kept"], kept, case["seed"] + 1, 1)
    both = first.then(second, tokens)
    close(both.matrix(tokens), second.matrix(first.kept) @ first.matrix(tokens))
    x = torch.randn(case["images"], tokens, 3)
    close(both.apply(x), second.apply(first.apply(x)))
    assert torch.equal(both.index, first.index.gather(1, second.index))


@settings(max_examples=60, deadline=None)
@given(cases(ALL_FORMS), st.data())
def test_composition_is_associative(case, data):
    first, tokens = make(**case), case["tokens"]
    form = st.sampled_from(ALL_FORMS)
    second = make(data.draw(form), case["images"], first.kept, max(first.kept - 1, 1), 5)
    third = make(data.draw(form), case["images"], second.kept, max(second.kept - 1, 1), 6)
    left = first.then(second, tokens).then(third, tokens)
    right = first.then(second.then(third, first.kept), tokens)
    close(left.matrix(tokens), right.matrix(tokens))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_constants_come_back(case):
    """Everything that is not dropped gets the constant back, and the rest what is asked for."""
    reduction, tokens = make(**case), case["tokens"]
    constant = torch.full((case["images"], tokens, 2), 3.0)
    back = reduction.recover(reduction.apply(constant), tokens, missing=3.0)
    close(back, constant)
    gone = reduction.matrix(tokens).sum(1) == 0
    blank = reduction.recover(reduction.apply(constant), tokens)
    close(blank, constant.masked_fill(gone[..., None], 0.0))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_sizes_count_every_token_that_is_not_dropped(case):
    reduction, tokens = make(**case), case["tokens"]
    sizes = reduction.sizes(tokens)
    assert sizes.shape == reduction.index.shape
    close(sizes.sum(-1), (reduction.matrix(tokens).sum(1) > 0).sum(-1).float())
    if case["form"] == "segments" and not case["drops"]:
        close(sizes.sum(-1), torch.full((case["images"],), float(tokens)))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_survivors_come_back_to_their_own_position(case):
    """What a survivor is worth is what its position gets back (unless it was mixed)."""
    if case["form"] == "dense":
        return
    reduction, tokens = make(**case), case["tokens"]
    y = torch.randn(case["images"], case["kept"], 2)
    back = reduction.recover(y, tokens)
    close(back.gather(1, reduction.index[..., None].expand(-1, -1, 2)), y)
    close(reduction.apply(back), y)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 3))
def test_tokens_in_front_pass_untouched(case, front):
    reduction, tokens = make(**case), case["tokens"]
    x = torch.randn(case["images"], front + tokens, 2)
    got = reduction.after(front).apply(x)
    assert torch.equal(got[:, :front], x[:, :front])
    close(got[:, front:], reduction.apply(x[:, front:]))
    back = reduction.after(front).recover(got, front + tokens)
    close(back[:, :front], x[:, :front])
    close(back[:, front:], reduction.recover(got[:, front:], tokens))


def test_segment_means_are_weighted_by_mass():
    index, slot = torch.tensor([[1, 2]]), torch.tensor([[0, 0, 1, -1]])
    reduction = Reduction.mean(index, slot, torch.tensor([[3.0, 1.0, 5.0, 9.0]]))
    x = torch.tensor([[[1.0], [5.0], [7.0], [100.0]]])
    assert reduction.apply(x).flatten().tolist() == [2.0, 7.0]
    assert reduction.sizes(4).tolist() == [[2.0, 1.0]]
    back = reduction.recover(reduction.apply(x), 4, missing=-1.0)
    assert back.flatten().tolist() == [2.0, 2.0, 7.0, -1.0]


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_stays(form):
    reduction = make(form, 2, 8, 4, 0)
    x = torch.randn(2, 8, 3).bfloat16()
    y = reduction.apply(x)
    assert y.dtype == torch.bfloat16
    assert reduction.recover(y, 8).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_means_of_many_are_rounded_once(kind):
    """Added up in half precision, 576 equal parts would stand still at half of their sum."""
    x = (1 + torch.rand(1, 576, 16, generator=torch.Generator().manual_seed(0))).to(kind)
    zeros = torch.zeros(1, 576, dtype=torch.long)
    mean = Reduction.mean(zeros[:, :1], zeros).apply(x)
    assert mean.dtype == kind
    assert torch.equal(mean[0, 0], x[0].double().mean(0).to(kind))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_to_what_is_left(form):
    reduction = make(form, 2, 8, 4, 0, drops=2)
    x = torch.randn(2, 8, 3, requires_grad=True)
    reduction.recover(reduction.apply(x), 8).sum().backward()
    used = reduction.matrix(8).sum(1) > 0
    assert torch.equal(x.grad.abs().sum(-1) > 0, used)


def test_labels_follow_their_survivors_into_raster_order():
    index = torch.tensor([[4, 0, 2]])
    label = torch.tensor([[7, 5, 6]])
    slot = torch.tensor([[1, -1, 2, 0, 0]])
    for more in ({}, {"slot": slot, "share": torch.ones(1, 5)}, {"weights": torch.rand(1, 3, 5)}):
        ascending = Reduction(index, ordered=True, label=label, **more).in_raster_order()
        assert ascending.index.tolist() == [[0, 2, 4]]
        assert ascending.label.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("form", ["gather", "mean", "dense"])
def test_raster_order_changes_the_order_and_nothing_else(form):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(3)])
    label = torch.rand(3, 4, generator=generator)
    if form == "mean":
        slot = torch.randint(-1, 4, (3, 9), generator=generator)
        slot = slot.scatter(1, index, torch.arange(4).expand(3, -1))
        made = Reduction.mean(index, slot)
    else:
        dense = torch.rand(3, 4, 9, generator=generator)
        made = Reduction(index, dense if form == "dense" else None)
    made = replace(made, ordered=True, label=label)
    raster, order = made.in_raster_order(), index.argsort(1)
    assert torch.equal(raster.index, index.sort(1).values)
    assert torch.equal(raster.label, label.gather(1, order))
    want = made.matrix(9).gather(1, order[..., None].expand(-1, -1, 9))
    assert torch.equal(raster.matrix(9), want)
    assert not raster.ordered


def test_what_fills_up_is_recovered_as_if_it_were_dropped():
    x, real = torch.randn(2, 6, 3), torch.tensor([[True, True], [True, False]])
    filled = Reduction(torch.tensor([[1, 4], [0, 5]]), valid=real)
    apart = [Reduction(torch.tensor([[1, 4]])), Reduction(torch.tensor([[0]]))]
    whole = filled.recover(filled.apply(x), 6)
    for image, alone in enumerate(apart):
        of = x[image : image + 1]
        assert torch.equal(whole[image], alone.recover(alone.apply(of), 6)[0])
    merged = Reduction.mean(torch.tensor([[0, 3], [0, 3]]), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2))
    after = merged.then(Reduction(torch.tensor([[0, 1], [0, 1]]), valid=real), 6)
    assert after.recover(torch.ones(2, 2, 1), 6)[..., 0].tolist() == [[1] * 6, [1] * 3 + [0] * 3]


@pytest.mark.parametrize("form", FORMS)
def test_altered_survivors_are_those_that_are_not_just_a_token(form):
    reduction = make(form, images=3, tokens=9, kept=4, seed=5, drops=2)
    x = torch.randn(3, 9, 5)
    differ = (reduction.apply(x) - Reduction(reduction.index).apply(x)).abs().amax(-1) > 1e-6
    assert reduction.altered(9).tolist() == differ.tolist()
    assert bool(differ.any()) == (form != "gather")
    assert form == "dense" or not bool(differ.all())


@settings(max_examples=80, deadline=None)
@given(cases(ALL_FORMS), st.sampled_from(ALL_FORMS), st.data())
def test_a_chain_is_undone_from_its_end(case, form, data):
    """With a residual anywhere, what was propagated gets the mean of those that it went into."""
    first, tokens = make(**case), case["tokens"]
    second = make(form, case["images"], first.kept, max(first.kept - 1, 1), 5)
    both = first.then(second, tokens)
    if "residual" not in (case["form"], form):
        assert not both.parts
        return
    y = torch.randn(case["images"], second.kept, 3)
    want = first.recover(second.recover(y, first.kept, 7.0), tokens, 7.0)
    close(both.recover(y, tokens, 7.0), want)
    index, weights = both.index[0], both.matrix(tokens)[0]
    own = weights[torch.arange(len(index)), index]
    plain = (own == 1) & (weights.abs().sum(-1) == own.abs())
    assert torch.equal(both.altered(tokens)[0], ~plain)


def test_what_was_propagated_comes_back_as_the_mean_of_where_it_went():
    residual = torch.tensor([[[0.3, 0.0], [0.1, 0.0]]])
    reduction = Reduction(
        torch.tensor([[0, 3]]), removed=torch.tensor([[1, 4]]), residual=residual,
        mass=torch.tensor([[1.5, 1.0]]),
    )  # fmt: skip
    y = torch.tensor([[[8.0], [4.0]]])
    back = reduction.recover(y, 5, missing=-1.0)[0, :, 0]
    assert back.tolist() == [8.0, 7.0, -1.0, 4.0, -1.0]
    assert reduction.sizes(5).tolist() == [[1.5, 1.0]]
    assert reduction.merges
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    hidden[0, 1] = True
    assert reduction.without(hidden).residual.abs().sum() == 0


@pytest.mark.parametrize("form", FORMS)
def test_mass_goes_into_the_survivors(form):
    """What counted more than once before a merge still does after it."""
    first = make("residual", 2, 9, 6, 0, 2)
    second = make(form, 2, 6, 3, 1)
    got = first.then(second, 9).mass
    matrix = second.matrix(6)
    if form == "segments":
        matrix = (matrix > 0).float()
    if form == "dense":
        matrix = matrix / matrix.sum(1, keepdim=True)
    close(got, (matrix @ first.mass[..., None])[..., 0])
    given = make("residual", 2, 6, 3, 1)
    assert torch.equal(first.then(given, 9).mass, given.mass)


def test_survivors_in_another_order_are_the_same():
    for form in ALL_FORMS:
        made = make(form, 2, 9, 5, 3, 1)
        order = torch.stack([torch.randperm(5), torch.randperm(5)])
        other = made.reordered(order)
        close(other.matrix(9), made.matrix(9).gather(1, order[..., None].expand(-1, -1, 9)))
        assert torch.equal(other.index, made.index.gather(1, order))
        close(other.sizes(9), made.sizes(9).gather(1, order))
