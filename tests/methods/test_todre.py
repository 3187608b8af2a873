"""ToDRE: diversity after the encoder, nothing in late layers."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.core.budget import per_request
from foveate.errors import BudgetError, FoveateError
from foveate.methods.todre import ToDRE


def naive(x, kept, rule, seed):
    """One image: the rules read aloud."""
    rows = F.normalize(x, dim=-1)
    far = [[1 - float(a @ b) for b in rows] for a in rows]
    total = len(x)
    sums = [sum(far[i][j] for j in range(total) if j != i) for i in range(total)]
    picked = [0 if seed == "first" else sums.index(max(sums))]
    how = sum if rule == "max-sum" else min
    while len(picked) < kept:
        trials = [i for i in range(total) if i not in picked]
        picked.append(max(trials, key=lambda i: how(far[i][j] for j in picked)))
    return sorted(picked)


@pytest.mark.parametrize("kept", [1, 2, 9, 23])
@pytest.mark.parametrize("rule", ["max-sum", "k-center"])
@pytest.mark.parametrize("seed", ["outlying", "first"])
def test_equals_the_naive_loop(kept, rule, seed, make_tokens, check_index):
    generator = torch.Generator().manual_seed(kept)
    x = torch.randn(3, 24, 8, dtype=torch.float64, generator=generator)
    index = ToDRE(rule=rule, seed=seed).reduce(make_tokens(images=3, x=x), kept).index
    check_index(index, kept, 24)
    for image in range(3):
        assert index[image].tolist() == naive(x[image], kept, rule, seed)


def test_max_sum_likes_outliers_and_k_center_covers(make_tokens):
    """Two tight bundles and one token between them: the sum never asks for it."""
    angles = torch.cat((torch.linspace(0, 0.2, 10), torch.linspace(1.4, 1.6, 10)))
    angles = torch.cat((angles, torch.tensor([0.8])))
    x = torch.stack((angles.cos(), angles.sin()), -1)[None]
    covered = ToDRE(rule="k-center").reduce(make_tokens((1, 21), x=x), 3).index[0]
    summed = ToDRE(rule="max-sum").reduce(make_tokens((1, 21), x=x), 6).index[0]
    assert 20 in covered
    assert 20 not in summed


def test_batch_equals_single(make_tokens):
    x = torch.randn(4, 24, 8)
    together = ToDRE().reduce(make_tokens(images=4, x=x), 9).index
    for image in range(4):
        alone = ToDRE().reduce(make_tokens(x=x[image : image + 1]), 9).index
        assert torch.equal(together[image : image + 1], alone)


@pytest.mark.parametrize("rule", ["max-sum", "k-center"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_tokens(value, dtype, rule, make_tokens, check_index):
    x = torch.full((2, 24, 8), value, dtype=dtype)
    for kept in (1, 5, 24):
        tokens = make_tokens(images=2, x=x)
        check_index(ToDRE(rule=rule).reduce(tokens, kept).index, kept, 24)


def test_one_token(make_tokens):
    assert ToDRE().reduce(make_tokens((1, 1), x=torch.randn(1, 1, 8)), 1).index.tolist() == [[0]]


@pytest.mark.parametrize(
    ("fields", "depth", "first", "places"),
    [
        ({}, 32, 0, ["pre_llm", "llm:24"]),
        ({}, 2, 0, ["pre_llm", "llm:1"]),
        ({}, 4, 3, ["pre_llm", "llm:3"]),
        ({"drop_layer": 5}, 32, 0, ["pre_llm", "llm:5"]),
        ({"drop_layer": -1}, 32, 0, ["pre_llm"]),
    ],
)
def test_places(fields, depth, first, places, facts):
    method = ToDRE(**fields)
    steps = method.steps(facts(text_layers=depth, first_llm_layer=first))
    assert [step.site for step in steps] == places
    method.check_budget(len(steps))
    counts = [method.count(576, 576, step, number) for number, step in enumerate(steps)]
    assert counts == [57, 0][: len(steps)]


def test_keeping_everything_keeps_it_to_the_end(facts):
    for keep, expected in (
        (1.0, [576, 576]), (0.5, [288, 0]), (1, [1, 0]), (600, [576, 0]),
        (per_request([0.5, 1.0]), [576, 576]),
    ):  # fmt: skip
        method = ToDRE(keep=keep)
        steps = enumerate(method.steps(facts()))
        assert [method.count(576, 576, step, i, row=1) for i, step in steps] == expected


def test_defaults_and_registration():
    method = get_method("todre")()
    assert isinstance(method, ToDRE)
    assert (method.keep, method.rule, method.published_positions) == (0.1, "max-sum", "renumbered")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        ToDRE(keep=2.0)
    with pytest.raises(BudgetError, match="2 entries"):
        ToDRE(keep=(0.2, 0.1))
    with pytest.raises(FoveateError, match="rule must be"):
        ToDRE(rule="median")
    with pytest.raises(FoveateError, match="seed must be"):
        ToDRE(seed="random")
