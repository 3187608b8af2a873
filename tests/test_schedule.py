"""Drops at layers: published ones carried over to other models."""

from dataclasses import dataclass

import pytest

from foveate.errors import BudgetError, LayerError
from foveate.methods import AdaToken3D, PyramidDrop, TransPrune
from foveate.schedule import nearest


@dataclass(frozen=True)
class Text:
    text_layers: int = 32
    first_llm_layer: int = 0
    windowed: tuple[int, ...] = ()

    @property
    def attention_layers(self):
        return tuple(i for i in range(self.text_layers) if i not in self.windowed)


def layers(method, model):
    return [step.layer for step in method.steps(model)]


@pytest.mark.parametrize("kind", [PyramidDrop, AdaToken3D, TransPrune])
def test_published_layers_on_the_published_depth(kind):
    assert layers(kind(), Text()) == list(kind.published_layers)
    assert layers(kind(), Text(64)) == [2 * layer for layer in kind.published_layers]


def test_another_number_of_drops_makes_equal_stages():
    assert layers(PyramidDrop(keep=0.5), Text()) == [16]
    assert layers(PyramidDrop(keep=(0.5, 0.4, 0.3, 0.2)), Text(30)) == [6, 12, 18, 24]


def test_layers_move_to_those_that_see_everything():
    model = Text(windowed=tuple(i for i in range(32) if i % 6 != 5))
    assert layers(PyramidDrop(), model) == [5, 17, 23]
    assert layers(PyramidDrop(), Text(6, first_llm_layer=2)) == [2, 3, 4]


def test_drops_that_meet_become_one_with_the_later_budget():
    method, model = AdaToken3D(), Text(4)
    steps = method.steps(model)
    assert [step.layer for step in steps] == [0, 1, 2, 3]
    alive, left = 100, []
    for number, step in enumerate(steps):
        alive = method.count(alive, 100, step, number)
        left.append(alive)
    assert left == [90, 75, 50, 25]
    method.check_budget(len(steps))


def test_nearest_takes_each_layer_once_while_there_are_enough():
    assert nearest((1, 2, 2), (1, 3, 5), "x") == [(1, 0), (3, 1), (5, 2)]
    assert nearest((2, 2, 9), (1, 3), "x") == [(1, 1), (3, 2)]


def test_no_layer_that_can_rank_is_an_error():
    with pytest.raises(LayerError, match="adatoken-3d: no decoder"):
        AdaToken3D().steps(Text(4, windowed=(0, 1, 2, 3)))


@pytest.mark.parametrize("given", [(4, 2), (3, 3), ()])
def test_layers_must_ascend(given):
    with pytest.raises(LayerError, match="ascending"):
        TransPrune(layers=given, keep=(0.5,) * 2)


def test_layers_and_budgets_must_agree():
    with pytest.raises(BudgetError, match="2 steps"):
        TransPrune(layers=(2, 4))
    with pytest.raises(LayerError, match=r"transprune.* begin at 1"):
        TransPrune(layers=(0, 2, 4))


def test_lists_become_tuples():
    assert PyramidDrop(layers=[1, 2, 3]) == PyramidDrop(layers=(1, 2, 3))
    assert hash(PyramidDrop(layers=[1, 2, 3]))
