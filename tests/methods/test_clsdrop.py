"""ClsDrop: class-token attention within encoder layers."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, LayerError
from foveate.methods.clsdrop import ClsDrop


def test_it_scores_in_the_layer_within_which_it_drops(facts):
    steps = ClsDrop(layers=(3, 6), keep=(0.7, 0.5)).steps(facts())
    assert [step.site for step in steps] == ["vision:3", "vision:6"]
    assert [step.needs[0].layers for step in steps] == [(3,), (6,)]
    assert all(step.inside and "proportional" not in step.effects for step in steps)


def test_scores_match_naive_loop(make_tokens):
    signal = torch.rand(2, 1, 4, 24)
    scores = ClsDrop().scores(make_tokens(images=2, cls_attention=signal))
    for image in range(2):
        for token in range(24):
            want = sum(float(signal[image, 0, head, token]) for head in range(4)) / 4
            assert scores[image, token].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kept", [1, 6, 24])
def test_keeps_exactly_the_highest(kept, make_tokens, check_index):
    signal = torch.rand(3, 1, 4, 24)
    index = ClsDrop().reduce(make_tokens(images=3, cls_attention=signal), kept).index
    check_index(index, kept, 24)
    for image in range(3):
        ranked = signal[image, 0].mean(0).argsort(descending=True).tolist()
        assert index[image].tolist() == sorted(ranked[:kept])


def test_batch_equals_single(make_tokens):
    signal = torch.rand(3, 1, 4, 24)
    together = ClsDrop().reduce(make_tokens(images=3, cls_attention=signal), 5).index
    for image in range(3):
        alone = ClsDrop().reduce(make_tokens(cls_attention=signal[image : image + 1]), 5).index
        assert torch.equal(together[image : image + 1], alone)


def test_defaults_and_registration():
    method = get_method("cls-drop")()
    assert isinstance(method, ClsDrop)
    assert (method.layers, method.keep, method.stage) == ((1,), 0.5, "vision")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        ClsDrop(layers=(1, 2), keep=0.5)
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises((LayerError, BudgetError)):
            ClsDrop(layers=layers, keep=0.5 if not layers else (0.5, 0.4))
