"""AdaToken-3D: PyramidDrop's ranking under another schedule."""

import torch

from foveate.core import get_method
from foveate.methods import AdaToken3D, PyramidDrop
from tests.core.test_schedule import Text


def test_defaults_are_the_released_schedule():
    method = get_method("adatoken-3d")()
    steps = method.steps(Text())
    assert [s.layer for s in steps] == [4, 8, 12, 16, 18, 20, 22, 24, 26, 28]
    left = [method.count(1000, 1000, s, i) for i, s in enumerate(steps)]
    assert left == [900, 800, 750, 700, 600, 550, 500, 450, 400, 250]


def test_question_answering_schedule():
    method = AdaToken3D(layers=(8, 16, 24), keep=(0.8, 0.6, 0.4))
    assert [s.layer for s in method.steps(Text())] == [8, 16, 24]


def test_ranks_as_pyramiddrop(make_tokens):
    tokens = make_tokens(images=2, text_attention=torch.rand(2, 1, 4, 24))
    assert torch.equal(AdaToken3D().scores(tokens), PyramidDrop().scores(tokens))
