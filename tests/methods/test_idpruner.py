"""IDPruner: maximal marginal relevance of importance and likeness."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError
from foveate.methods.idpruner import IDPruner, scaled
from tests.methods.chance import features, seen


@pytest.mark.parametrize("kept", [1, 2, 9, 23, 24])
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 1.0])
def test_it_keeps_what_a_plain_loop_keeps(kept, weight, make_tokens, check_index, transcribed):
    x, attention = features(3, 24), seen(3, 24)
    tokens = make_tokens(images=3, x=x, cls_attention=attention)
    index = IDPruner(mmr_lambda=weight).reduce(tokens, kept).index
    check_index(index, kept, 24)
    for image in range(3):
        tensors = {"x": x[image], "cls_attention": attention[image]}
        wanted = transcribed("idpruner").transcription(tensors, kept, weight)
        assert index[image].tolist() == wanted.tolist()


def test_likeness_counts_against_importance(make_tokens):
    x = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [-1, 0]]])
    attention = torch.tensor([0.4, 0.35, 0.05, 0.2]).view(1, 1, 1, 4)
    tokens = make_tokens((1, 4), x=x, cls_attention=attention)
    assert IDPruner().reduce(tokens, 2).index.tolist() == [[0, 3]]
    assert IDPruner(mmr_lambda=1.0).reduce(tokens, 2).index.tolist() == [[0, 1]]


def test_the_unit_of_importance_does_not_matter(make_tokens):
    x, attention = features(2, 24), torch.rand(2, 1, 24)
    kept = [
        IDPruner().reduce(make_tokens(images=2, x=x, received_attention=attention * unit), 9).index
        for unit in (1e-6, 1.0, 1e6)
    ]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_scaled_importance():
    scores = torch.tensor([[2.0, 4, 3, -torch.inf], [5, 5, 5, 5]])
    assert scaled(scores).tolist() == [[0, 1, 0.5, -torch.inf], [0, 0, 0, 0]]


def test_batch_equals_single(make_tokens):
    x, attention = features(4, 24), seen(4, 24)
    together = IDPruner().reduce(make_tokens(images=4, x=x, cls_attention=attention), 9).index
    for image in range(4):
        one = slice(image, image + 1)
        alone = make_tokens(x=x[one], cls_attention=attention[one])
        assert torch.equal(IDPruner().reduce(alone, 9).index, together[one])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_equal_tokens_are_never_picked_twice(value, weight, make_tokens, check_index):
    tokens = make_tokens(
        images=2, x=torch.full((2, 24, 8), value), cls_attention=torch.full((2, 1, 3, 24), 1 / 24)
    )
    for kept in (1, 5, 24):
        index = IDPruner(mmr_lambda=weight).reduce(tokens, kept).index
        check_index(index, kept, 24)
        assert index[0].tolist() == list(range(kept))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_newlines_come_last(weight, make_tokens, check_index):
    attention = seen(2, 24)
    attention[..., 5::6] = -torch.inf
    tokens = make_tokens(images=2, x=features(2, 24), cls_attention=attention)
    for kept in (20, 22, 24):
        index = IDPruner(mmr_lambda=weight).reduce(tokens, kept).index
        check_index(index, kept, 24)
        assert len({5, 11, 17, 23} & set(index[0].tolist())) == kept - 20


def test_defaults_and_registration(facts):
    method = get_method("idpruner")()
    assert isinstance(method, IDPruner)
    assert (method.keep, method.mmr_lambda) == (0.25, 0.5)
    (step,) = method.steps(facts())
    assert [(need.name, need.layers) for need in step.needs] == [("cls_attention", (22,))]


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        IDPruner(keep=0)
    with pytest.raises(FoveateError, match="mmr_lambda"):
        IDPruner(mmr_lambda=1.5)
