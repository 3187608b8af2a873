"""Token counts, step by step, without a model."""

from foveate.core.counting import TokenCount
from foveate.methods import LVLMCSP, FastV, PyramidDrop
from tests.core.test_schedule import Text
from tests.methods_for_tests import Listed


def taken(image, method, number, model):
    return [image.take(method, step, i, number) for i, step in enumerate(method.steps(model))]


def test_each_method_counts_from_the_tokens_where_it_begins():
    model, image = Text(), TokenCount(100)
    assert taken(image, Listed(keep=0.5), 0, model) == [50]
    assert taken(image, PyramidDrop((2, 4), (0.5, 0.2), "original"), 1, model) == [25, 10]


def test_tokens_come_back_as_many_as_they_were():
    model, image = Text(), TokenCount(100)
    assert taken(image, FastV(keep=0.4), 0, model) == [40]
    assert taken(image, LVLMCSP(keep=(0.5, 0.25)), 1, model) == [20, 40, 10]
