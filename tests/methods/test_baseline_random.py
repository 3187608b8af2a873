"""Random: the same subset for every image of equal size."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.baseline_random import Random


@pytest.mark.parametrize("kept", [1, 6, 24])
def test_keeps_exact_count(kept, make_tokens, check_index):
    check_index(Random().reduce(make_tokens(images=3), kept).index, kept, 24)


def test_choice_is_the_permutation_of_the_seed(make_tokens):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    expected = sorted(sorted(range(24), key=lambda i: -order[i])[:6])
    assert Random(seed=3).reduce(make_tokens(), 6).index[0].tolist() == expected


def test_every_image_gets_what_it_gets_alone(make_tokens):
    together = Random().reduce(make_tokens(images=3), 6).index
    alone = Random().reduce(make_tokens(), 6).index
    assert torch.equal(together, alone.expand(3, -1))


def test_seed_decides_and_global_state_does_not(make_tokens):
    torch.manual_seed(0)
    first = Random(seed=1).reduce(make_tokens(), 6).index
    state = torch.random.get_rng_state()
    assert torch.equal(Random(seed=1).reduce(make_tokens(), 6).index, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(Random(seed=2).reduce(make_tokens(), 6).index, first)


def test_smaller_budget_keeps_a_subset(make_tokens):
    many = set(Random().reduce(make_tokens(), 12).index[0].tolist())
    few = set(Random().reduce(make_tokens(), 5).index[0].tolist())
    assert few < many


def test_every_token_has_its_chance(make_tokens):
    kept = torch.cat([Random(seed=s).reduce(make_tokens(), 6).index for s in range(400)])
    share = kept.flatten().bincount(minlength=24) / 400
    assert (share - 0.25).abs().max() < 0.09


def test_one_token(make_tokens):
    assert Random().reduce(make_tokens((1, 1)), 1).index.tolist() == [[0]]


def test_defaults_and_registration(facts):
    method = get_method("random")()
    assert (method.keep, method.seed, method.published_positions) == (0.25, 0, "renumbered")
    (step,) = method.steps(facts())
    assert (step.site, step.needs) == ("pre_llm", ())


@pytest.mark.parametrize("seed", [-1, 1.5, None, True, 2**63])
def test_wrong_seed_is_refused(seed):
    with pytest.raises(FoveateError, match="seed"):
        Random(seed=seed)


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        Random(keep=-1)
    with pytest.raises(FoveateError, match="positions"):
        Random(positions="none")
