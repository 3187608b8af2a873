"""DivPrune: greedy max-min selection over cosine distance."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import get_method
from foveate.core.budget import count
from foveate.errors import BudgetError, FoveateError
from foveate.methods.divprune import DivPrune
from foveate.ops.diversity import cosine_distance, select_diverse


def naive_distance(x):
    """Distances by the definition, in double precision, one pair at a time."""
    rows = F.normalize(x.double(), dim=-1)
    return [[1 - float(rows[i] @ rows[j]) for j in range(len(x))] for i in range(len(x))]


def naive_order(distance, kept):
    """The greedy rule read aloud: rebuild everything at each step."""
    total = len(distance)
    near = [sorted(distance[row][i] for row in range(total))[1] for i in range(total)]
    picked = [near.index(max(near))]
    while len(picked) < kept:
        best, best_distance = -1, -math.inf
        for i in range(total):
            nearest = min(distance[i][j] for j in picked)
            if i not in picked and nearest > best_distance:
                best, best_distance = i, nearest
        picked.append(best)
    return picked


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), total=st.integers(2, 20), width=st.integers(2, 9), data=st.data()
)
def test_every_pick_is_the_farthest(seed, total, width, data):
    kept = data.draw(st.integers(1, total))
    x = torch.randn(total, width, generator=torch.Generator().manual_seed(seed)).double()
    order = select_diverse(cosine_distance(x[None]), kept)[0].tolist()
    distance = naive_distance(x)
    assert len(set(order)) == kept
    # Two tokens that are each other's nearest tie, and rounding decides: compare values, not names.
    near = [sorted(row)[1] for row in distance]
    assert near[order[0]] >= max(near) - 1e-9
    for step in range(1, kept):
        picked = order[:step]
        nearest = {i: min(distance[i][j] for j in picked) for i in range(total) if i not in picked}
        assert nearest[order[step]] >= max(nearest.values()) - 1e-9


def test_order_equals_the_naive_loop_where_nothing_ties():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).double()
    distance = naive_distance(x)
    wanted = naive_order(distance, 25)
    order = select_diverse(cosine_distance(x[None]), 25)[0].tolist()
    assert set(order[:2]) == set(wanted[:2]) or order == wanted
    assert sorted(order) == sorted(wanted)


def test_distances_match_naive_loop():
    x = torch.randn(12, 5)
    distance = cosine_distance(x[None])[0]
    torch.testing.assert_close(distance, torch.tensor(naive_distance(x), dtype=torch.float32))


def test_seed_is_the_token_with_the_farthest_neighbour():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
    assert select_diverse(cosine_distance(x[None]), 1).tolist() == [[2]]


def test_ties_go_to_the_lower_index():
    """Eight corners' distances to each other take few values: every step is a tie."""
    x = torch.cat((torch.eye(4), -torch.eye(4)))
    order = select_diverse(cosine_distance(x[None]), 8)[0].tolist()
    assert order == naive_order(cosine_distance(x[None])[0].tolist(), 8)
    assert order[:2] == [0, 4]


@pytest.mark.parametrize("kept", [1, 2, 7, 24])
def test_keeps_exact_count_in_raster_order(kept, make_tokens, check_index):
    x = torch.randn(3, 24, 8)
    index = DivPrune().reduce(make_tokens(images=3, x=x), kept).index
    check_index(index, kept, 24)
    order = select_diverse(cosine_distance(x), kept)
    assert torch.equal(index, order.sort(dim=-1).values)


def test_smaller_budget_picks_a_prefix():
    x = torch.randn(2, 24, 8)
    long = select_diverse(cosine_distance(x), 20)
    assert torch.equal(select_diverse(cosine_distance(x), 6), long[:, :6])


def test_batch_equals_single(make_tokens):
    x = torch.randn(4, 24, 8)
    together = DivPrune().reduce(make_tokens(images=4, x=x), 9).index
    for image in range(4):
        alone = DivPrune().reduce(make_tokens(x=x[image : image + 1]), 9).index
        assert torch.equal(together[image : image + 1], alone)


def test_length_of_tokens_does_not_matter(make_tokens):
    x = torch.randn(1, 24, 8)
    scaled = x * torch.rand(1, 24, 1).add(0.1)
    first = DivPrune().reduce(make_tokens(x=x), 9).index
    assert torch.equal(DivPrune().reduce(make_tokens(x=scaled), 9).index, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_equal_tokens_are_never_picked_twice(value, dtype, make_tokens, check_index):
    x = torch.full((2, 24, 8), value, dtype=dtype)
    for kept in (1, 5, 24):
        check_index(DivPrune().reduce(make_tokens(images=2, x=x), kept).index, kept, 24)


def test_zero_tokens_are_orthogonal_to_all(make_tokens, check_index):
    x = torch.randn(1, 24, 8)
    x[0, [0, 7]] = 0
    distance = cosine_distance(x)
    assert distance.isfinite().all()
    assert (distance[0, 7] == 1).all()
    for kept in (1, 9, 24):
        check_index(DivPrune().reduce(make_tokens(x=x), kept).index, kept, 24)


def test_one_token(make_tokens):
    assert DivPrune().reduce(make_tokens((1, 1), x=torch.randn(1, 1, 8)), 1).index.tolist() == [[0]]


def test_half_precision_is_compared_in_float32():
    x = torch.randn(1, 24, 8).bfloat16()
    assert cosine_distance(x).dtype == torch.float32
    assert torch.equal(cosine_distance(x), cosine_distance(x.float()))
    assert cosine_distance(x.double()).dtype == torch.float64


def test_features_stay_as_they_are_and_may_require_grad(make_tokens):
    x = torch.randn(1, 24, 8, requires_grad=True)
    before = x.detach().clone()
    DivPrune().reduce(make_tokens(x=x), 5)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(("total", "expected"), [(576, 56), (36, 4), (144, 14)])
def test_default_share_gives_the_published_counts(total, expected):
    method = DivPrune()
    assert count(method.keep, total, step=0, row=0, rounding=type(method).rounding) == expected


def test_defaults_and_registration(facts):
    method = get_method("divprune")()
    assert isinstance(method, DivPrune)
    assert (method.keep, method.published_positions) == (0.098, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, step.needs) == ("pre_llm", ())


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        DivPrune(keep=2.0)
    with pytest.raises(FoveateError, match="positions"):
        DivPrune(positions="none")
