"""HoliTom's inner merging: what is kept, where the rest goes, and what it is worth there."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core import get_method
from foveate.errors import BudgetError, LayerError
from foveate.methods.holitom_inner import HoliTomInner, folded_shares, most_similar
from tests.core.test_schedule import Text


def naive(x, attention, count):
    """One image: fold dropped tokens one after another, as the paper's code does."""
    score = attention.mean(0)
    kept = sorted(sorted(range(len(x)), key=lambda v: -float(score[v]))[:count])
    state = {v: x[v].clone() for v in kept}
    for v in range(len(x)):
        if v in state:
            continue
        target = max(kept, key=lambda k: float(F.cosine_similarity(x[v], x[k], dim=0)))
        state[target] = (state[target] + x[v]) / 2
    return kept, torch.stack([state[v] for v in kept])


@pytest.mark.parametrize(("total", "count"), [(24, 12), (24, 1), (24, 23), (17, 5)])
def test_merging_equals_a_naive_loop(total, count, make_tokens):
    x = torch.randn(3, total, 8).double()
    attention = torch.rand(3, 1, 4, total)
    tokens = make_tokens((1, total), images=3, x=x, text_attention=attention)
    reduction = HoliTomInner().reduce(tokens, count)
    got = reduction.apply(x)
    for image in range(3):
        kept, states = naive(x[image], attention[image, 0], count)
        assert reduction.index[image].tolist() == kept
        torch.testing.assert_close(got[image], states)


def test_the_last_folded_weighs_most():
    """Survivors 1 and 4; tokens 0, 2 and 5 go into 1, and 3 into 4."""
    share = folded_shares(torch.tensor([[1, 4]]), torch.tensor([[0, 0, 0, 1, 1, 0]]))
    assert share.tolist() == [[0.125, 0.125, 0.25, 0.5, 0.5, 0.5]]


def test_shares_sum_to_one():
    slot = torch.randint(0, 6, (4, 30))
    index = torch.arange(6).expand(4, -1) * 4
    slot = slot.scatter(1, index, torch.arange(6).expand(4, -1))
    share = folded_shares(index, slot)
    sums = torch.zeros(4, 6).scatter_add(1, slot, share)
    torch.testing.assert_close(sums, torch.ones(4, 6))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_states_stay(value, make_tokens):
    x = torch.full((2, 24, 8), value)
    tokens = make_tokens(images=2, x=x, text_attention=torch.zeros(2, 1, 4, 24))
    reduction = HoliTomInner().reduce(tokens, 6)
    torch.testing.assert_close(reduction.apply(x), x[:, :6])
    assert (reduction.index.diff(dim=-1) > 0).all()


def test_a_survivor_is_its_own(make_tokens):
    x = torch.ones(1, 6, 4)
    assert most_similar(x, torch.tensor([[1, 3]])).tolist() == [[0, 0, 0, 1, 0, 0]]


def test_images_do_not_see_each_other(make_tokens):
    x, attention = torch.randn(3, 24, 8), torch.rand(3, 1, 4, 24)
    whole = HoliTomInner().reduce(make_tokens(images=3, x=x, text_attention=attention), 9)
    for i in range(3):
        part = slice(i, i + 1)
        alone = HoliTomInner().reduce(make_tokens(x=x[part], text_attention=attention[part]), 9)
        assert torch.equal(alone.slot, whole.slot[part])
        assert torch.equal(alone.share, whole.share[part])


def test_the_layer_before_ranks():
    (step,) = get_method("holitom-inner")().steps(Text(28))
    assert (step.layer, step.needs[0].layers) == (18, (17,))
    (step,) = HoliTomInner(layers=(3,)).steps(Text(8))
    assert (step.layer, step.needs[0].layers) == (3, (2,))
    assert HoliTomInner().published_positions == "original"


def test_shares_of_the_count_are_rounded():
    method = HoliTomInner(layers=(3,), keep=0.3)
    (step,) = method.steps(Text(8))
    assert method.count(61, 61, step, 0) == 18


def test_wrong_arguments_are_refused():
    with pytest.raises(LayerError, match="begin at 1"):
        HoliTomInner(layers=(0,))
    with pytest.raises(BudgetError):
        HoliTomInner(keep=1.5)
