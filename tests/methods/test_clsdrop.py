"""ClsDrop: class-token attention within encoder layers."""

import pytest

from foveate.core import get_method
from foveate.errors import BudgetError, LayerError
from foveate.methods.clsdrop import ClsDrop


def test_it_scores_in_the_layer_within_which_it_drops(facts):
    steps = ClsDrop(layers=(3, 6), keep=(0.7, 0.5)).steps(facts())
    assert [step.site for step in steps] == ["vision:3", "vision:6"]
    assert [step.needs[0].layers for step in steps] == [(3,), (6,)]
    assert all(step.inside and "proportional" not in step.effects for step in steps)


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
