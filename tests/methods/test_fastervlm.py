"""FasterVLM: class-token attention of one encoder layer."""

import pytest

from foveate.core import get_method
from foveate.core.budget import count
from foveate.errors import BudgetError, FoveateError
from foveate.methods.fastervlm import FasterVLM


def test_it_scores_in_the_feature_layer(facts):
    (step,) = FasterVLM().steps(facts())
    (need,) = step.needs
    assert (step.site, need.name, need.layers) == ("pre_llm", "cls_attention", (22,))


@pytest.mark.parametrize(("share", "expected"), [(0.25, 144), (0.1, 58), (0.05, 29)])
def test_shares_give_the_published_counts(share, expected):
    method = FasterVLM(keep=share)
    kept = count(method.keep, 576, step=0, row=0, rounding=type(method).rounding)
    assert kept == expected


def test_defaults_and_registration():
    method = get_method("fastervlm")()
    assert isinstance(method, FasterVLM)
    assert (method.keep, method.published_positions) == (0.25, "renumbered")


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        FasterVLM(keep=0)
    with pytest.raises(FoveateError, match="positions"):
        FasterVLM(positions="none")
