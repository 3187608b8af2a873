"""Greedy choices of unlike tokens."""

import pytest
import torch

from foveate.ops.diversity import (
    cosine_distance,
    nearest_other,
    normalize,
    select_determinant,
    select_diverse,
)


def naive_determinant(kernel, kept):
    """Every pick tries every token, and takes the one with the largest determinant."""
    picked = []
    while len(picked) < kept:
        trials = [i for i in range(len(kernel)) if i not in picked]
        found = {i: kernel[[*picked, i]][:, [*picked, i]].det().item() for i in trials}
        picked.append(max(found, key=found.get))
    return picked


@pytest.mark.parametrize("kept", [1, 2, 8, 12])
def test_every_pick_adds_the_largest_factor_to_the_determinant(kept):
    x = torch.randn(3, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = x @ x.mT
    order, gains = select_determinant(kernel, kept)
    for image in range(3):
        assert order[image].tolist() == naive_determinant(kernel[image], kept)
        chosen = kernel[image][order[image]][:, order[image]]
        torch.testing.assert_close(gains[image].prod(), chosen.det())


def test_beyond_the_rank_gains_are_zero_and_nothing_is_picked_twice():
    x = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    order, gains = select_determinant(x @ x.mT, 40)
    assert gains.isfinite().all()
    assert (gains[:, :5] > 1e-2).all()
    assert (gains[:, 5:] == 0).all()
    assert order.sort(1).values.tolist() == [list(range(40))] * 2


def test_a_faint_token_still_counts():
    """Next to a token a million times its size, what a token adds is no rounding."""
    x = torch.eye(3)[None] * torch.tensor([1.0, 1e-3, 1e-4])[:, None]
    order, gains = select_determinant(x @ x.mT, 3)
    assert order.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(gains, torch.tensor([[1.0, 1e-6, 1e-8]]))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20])
def test_constant_kernels(value):
    order, gains = select_determinant(torch.full((2, 9, 9), value), 9)
    assert gains.isfinite().all()
    assert order.sort(1).values.tolist() == [list(range(9))] * 2


def naive_diverse(distance, kept, first, how):
    picked = [first.index(max(first))]
    while len(picked) < kept:
        trials = [i for i in range(len(distance)) if i not in picked]
        picked.append(max(trials, key=lambda i: how(distance[i][j] for j in picked)))
    return picked


@pytest.mark.parametrize(("gather", "how"), [(torch.add, sum), (torch.minimum, min)])
def test_rules_of_greedy_choice(gather, how):
    x = torch.randn(3, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    distance = cosine_distance(x)
    first = distance.sum(-1)
    wanted = [
        naive_diverse(d, 12, f, how) for d, f in zip(distance.tolist(), first.tolist(), strict=True)
    ]
    assert select_diverse(distance.clone(), 12, first, gather).tolist() == wanted


def test_the_first_pick_of_max_min_has_the_farthest_neighbour():
    distance = cosine_distance(torch.randn(2, 15, 4))
    wanted = nearest_other(distance).argmax(1, keepdim=True)
    assert torch.equal(select_diverse(distance, 1), wanted)


def test_unit_rows():
    x = torch.randn(2, 3, 4).half()
    x[0, 1] = 0
    rows = normalize(x)
    assert rows.dtype == torch.float32
    assert rows[0, 1].tolist() == [0] * 4
    torch.testing.assert_close(rows[1].norm(dim=-1), torch.ones(3))


def almost_alike(images, total, seed=0):
    """Images of the same six tokens again and again, told apart by 1e-7."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(6, 16, generator=generator)
    x = kinds[torch.randint(6, (total,), generator=generator)].expand(images, -1, -1)
    return x * (1 + 1e-7 * torch.randn(images, total, 16, generator=generator))


@pytest.mark.parametrize("images", [1, 2, 3, 5])
@pytest.mark.parametrize("gather", [torch.minimum, torch.add])
def test_tokens_that_rounding_tells_apart_are_picked_by_index(images, gather):
    x = almost_alike(5, 40)
    first = cosine_distance(x).sum(-1)
    wanted = select_diverse(cosine_distance(x), 30, first, gather)
    assert bool((wanted == wanted[:1]).all())
    got = select_diverse(cosine_distance(x[:images]), 30, first[:images], gather)
    assert torch.equal(got, wanted[:images])


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_determinants_that_rounding_tells_apart_go_by_index(images):
    x = torch.nn.functional.normalize(almost_alike(5, 40), dim=-1)
    wanted, gains = select_determinant(x @ x.mT, 30)
    assert bool((wanted == wanted[:1]).all())
    assert (gains > 0).sum(1).tolist() == [6] * 5
    got, _ = select_determinant(x[:images] @ x[:images].mT, 30)
    assert torch.equal(got, wanted[:images])
