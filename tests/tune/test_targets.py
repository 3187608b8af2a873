"""Targets are read from text, and what is wrong with one is said in one line."""

import pytest

from foveate.errors import InputError
from foveate.tune.targets import Aim, Target, parse_target


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("accuracy>=-1", Target("accuracy", -1.0)),
        (" ttft <= 0.5x ", Target("ttft", 0.5)),
        ("kl<=1e-2", Target("kl", 0.01)),
        ("agreement>=98.5", Target("agreement", 98.5)),
    ],
)
def test_targets_are_read(text, wanted):
    assert parse_target(text) == wanted
    assert parse_target(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy", "such as accuracy>=-1"),
        ("speed<=0.5x", "no metric speed"),
        ("ttft<=0.5", "as ttft<=0.5x"),
        ("accuracy>=-1x", "without an x"),
        ("ttft>=0.5x", "bounded with <="),
        ("accuracy<=1", "bounded with >="),
        ("flops<=1.5x", "from 0 to 1"),
        ("state>=2", "from -1 to 1"),
        ("flops<=0x", "from 0 to 1"),
        ("flops<=..x", "not a number"),
    ],
)
def test_what_is_wrong_is_one_line(text, said):
    with pytest.raises(InputError) as caught:
        parse_target(text)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("targets", "minimize", "answered", "said"),
    [
        (["accuracy>=-1"], [], True, "nothing to save"),
        ([], ["flops"], True, "bound on quality too, as --target accuracy>=-1"),
        ([], ["flops"], False, "as --target agreement>=98"),
        (["accuracy>=-1"], ["flops"], False, "needs questions with an `answer`"),
        (["accuracy>=-1"], ["speed"], True, "--minimize takes flops"),
        (["flops<=0.5x", "flops<=0.2x"], [], True, "names flops twice"),
    ],
)
def test_aims_that_make_no_search_are_refused(targets, minimize, answered, said):
    with pytest.raises(InputError, match=said):
        Aim.of(targets, minimize, answered)


def test_a_target_is_met_up_to_its_bound():
    assert Target("accuracy", -1).met({"accuracy": -1.0})
    assert not Target("accuracy", -1).met({"accuracy": -1.1})
    assert Target("flops", 0.5).met({"flops": 0.5})
    assert not Target("flops", 0.5).met({"flops": 0.51})
