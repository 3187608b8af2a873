"""Ranking: rounding decides nothing, and the lower index wins ties."""

import pytest
import torch

from foveate.core import ranking
from foveate.core.ranking import TIE, among_top, bottom, highest, ranked, top


def tied(images=5, total=40, kinds=6, seed=0):
    """(G, V) scores of few values, the same in every row, and what rounding makes of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(kinds, generator=generator) + 0.1
    scores = values[torch.randint(kinds, (total,), generator=generator)].expand(images, -1)
    noise = torch.rand(images, total, generator=generator, dtype=torch.float64) - 0.5
    return scores, (scores * (1 + noise * TIE / 2)).float()


def naive(scores, count):
    """One row: the highest, exact ties by index."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


@pytest.mark.parametrize("count", [0, 1, 7, 20, 39, 40])
def test_ties_within_rounding_go_by_index(count):
    exact, rounded = tied()
    for scores in (exact, rounded):
        index = top(scores, count)
        assert index.tolist() == [sorted(naive(row, count)) for row in exact]
        assert bottom(-scores, count).tolist() == index.tolist()
        assert ranked(scores)[:, :count].tolist() == [naive(row, count) for row in exact]
    assert highest(rounded).tolist() == [naive(row, 1)[0] for row in exact]


def test_scores_that_differ_are_ranked_as_they_are():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randperm(200, generator=generator).view(4, 50) * 4 * TIE + 1
    order = scores.argsort(dim=1, descending=True)
    assert torch.equal(ranked(scores), order)
    assert torch.equal(top(scores, 13), order[:, :13].sort(1).values)
    assert torch.equal(highest(scores), order[:, 0])


@pytest.mark.parametrize("count", [1, 9, 30])
def test_both_ways_to_find_the_highest_agree(count):
    """The one that looks for ties, and the one that cannot afford to."""
    for scores in (torch.rand(3, 31), *tied(3, 31)):
        value = scores.topk(count).values[:, -1:]
        chosen = ranking._chosen(scores, count, value, ranking.near_of(value, None))
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == top(scores, count).tolist()


def test_numbers_of_their_own_for_each_row():
    exact, rounded = tied(4)
    counts = torch.tensor([[0], [3], [11], [12]])
    chosen = among_top(rounded, counts, 12)
    for row, count in enumerate(counts[:, 0].tolist()):
        assert chosen[row].nonzero()[:, 0].tolist() == sorted(naive(exact[row], count))


def test_a_scale_says_what_differences_are_rounded_from():
    scores = torch.tensor([[0.0, TIE / 2, 3 * TIE, -torch.inf]])
    assert top(scores, 2, scale=1.0).tolist() == [[0, 2]]
    assert top(scores, 2, scale=0.0).tolist() == [[1, 2]]
    assert ranked(scores, 1.0).tolist() == [[2, 0, 1, 3]]
    assert highest(scores, 8.0).tolist() == [0]


def test_infinite_and_undefined_scores_leave_as_many():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, torch.inf], [torch.nan, 1.0, 2.0, 3.0]])
    for count in range(1, 4):
        index = top(scores, count)
        assert index.shape == (2, count)
        assert bool((index.diff() > 0).all())
    assert top(scores[:1], 3).tolist() == [[0, 1, 3]]
    assert top(scores[:1], 1).tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_ranked_like_the_same_in_full(dtype):
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)).to(dtype)
    full = scores.float()
    for count in (1, 7, 49, 50):
        assert torch.equal(top(scores, count), top(full, count))
    assert torch.equal(ranked(scores), ranked(full))
    assert torch.equal(highest(scores), highest(full))
    counts = torch.tensor([[3], [9], [1], [20]])
    assert torch.equal(among_top(scores, counts, 20), among_top(full, counts, 20))
