"""Drops at layers: published ones carried over to other models."""

from dataclasses import dataclass

import pytest

from foveate import per_request
from foveate.bench.levels import method_at
from foveate.cli.bench_speed import read_methods
from foveate.core.from_text import make_method, make_methods
from foveate.core.resolve import methods_of
from foveate.core.schedule import nearest
from foveate.errors import BudgetError, LayerError
from foveate.methods import CATP, AdaToken3D, PyramidDrop, SparseVLM, TransPrune
from tests.shares import mean_share


@dataclass(frozen=True)
class Text:
    text_layers: int = 32
    first_llm_layer: int = 0
    windowed: tuple[int, ...] = ()

    @property
    def last_llm_layer(self):
        return self.text_layers - 1

    @property
    def keyed_layers(self):
        return tuple(range(self.text_layers))

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
    assert layers(PyramidDrop(keep=(0.5,)), Text()) == [16]
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


SCHEDULED = {
    "pyramiddrop": PyramidDrop, "adatoken-3d": AdaToken3D, "transprune": TransPrune,
    "sparsevlm": SparseVLM,
}  # fmt: skip


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25, 0.125, 0.03])
@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("depth", [32, 80, 6])
def test_one_number_is_the_mean_over_the_layers_after_the_first_drop(name, keep, depth):
    method, model = SCHEDULED[name](keep=keep), Text(depth)
    assert mean_share(method, model) == pytest.approx(keep, abs=0.005)
    assert len(method.steps(model)) == len(SCHEDULED[name]().steps(model))


@pytest.mark.parametrize("name", SCHEDULED)
def test_one_number_means_the_same_wherever_it_is_given(name):
    method = SCHEDULED[name](keep=0.25)
    assert method_at(name, 0.25, Text()) == method
    assert make_method(name, "0.25") == method
    assert make_methods([name], ["0.25"]) == (method,)
    assert read_methods(name, "0.25") == [method]
    assert methods_of(name, keep=0.25) == (method,)


@pytest.mark.parametrize("name", SCHEDULED)
def test_without_a_number_the_published_schedule_is_what_one_gets(name):
    method = SCHEDULED[name]()
    left, steps = [], method.steps(Text())
    for number, step in enumerate(steps):
        assert step.curve is None
        left.append(method.count(576, 576, step, number))
    rounding = type(method).rounding
    assert left == [int(rounding(576 * share)) for share in method.published_shares]


def test_catp_takes_one_number_for_its_first_choice():
    """Which is the mean over all layers, as nothing else drops."""
    assert mean_share(CATP(keep=0.25), Text()) == 0.25
    assert method_at("catp", 0.25, Text()) == CATP(keep=0.25)


def left(method, total, row=0):
    alive, counts = total, []
    for number, step in enumerate(method.steps(Text())):
        alive = method.count(alive, total, step, number, row)
        counts.append(alive)
    return counts


def test_counts_are_means_too_and_everything_is_everything():
    first, second, third = left(PyramidDrop(keep=64), 576)
    assert first > second > third
    assert first + second + third == pytest.approx(3 * 64, abs=2)
    for keep in (1.0, 576, 10**6):
        assert left(PyramidDrop(keep=keep), 576) == [576] * 3
    assert sum(left(PyramidDrop(keep=1), 576)) <= 4


def test_requests_have_means_of_their_own():
    method = PyramidDrop(keep=per_request([0.25, 64, 1.0]))
    assert left(method, 576, 0) == left(PyramidDrop(keep=0.25), 576)
    assert left(method, 576, 1) == left(PyramidDrop(keep=64), 576)
    assert left(method, 576, 2) == [576] * 3


def test_as_many_layers_as_published_take_a_mean_and_one_a_share():
    assert left(PyramidDrop((2, 20, 30), 0.25), 576) != left(PyramidDrop(keep=0.25), 576)
    assert mean_share(PyramidDrop((2, 20, 30), 0.25), Text()) == pytest.approx(0.25, abs=0.005)
    assert left(PyramidDrop((2,), 0.25), 576) == [144]
    assert left(SparseVLM(keep=0.5, rank=1.0), 576) == [288]
    with pytest.raises(BudgetError, match="has 1 entries, but the method has 2 steps"):
        PyramidDrop((2, 4), 0.5)
