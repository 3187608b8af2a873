"""Answers and statistics."""

import math

import pytest
import torch

from foveate.bench.judge import is_right, kl, majority
from foveate.bench.report import _number_row
from foveate.bench.stats import Paired, wilson
from foveate.bench.summary import Line


@pytest.mark.parametrize(
    ("said", "answer", "choices", "right"),
    [
        ("Red.", "red", (), True),
        ("The answer is three", "3", (), True),
        ("a red star", "red", (), True),
        ("It looks red to me", "red", ("red", "blue"), True),
        ("red or blue", "blue", ("red", "blue"), False),
        ("12", "1", (), False),
        ("", "red", (), False),
        ("True", "yes", (), True),
    ],
)
def test_answers_are_judged_by_what_they_say(said, answer, choices, right):
    assert is_right(said, answer, choices) is right


def test_kl_is_zero_of_equals_and_known_of_others():
    a = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    b = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert kl(a, a).tolist() == [0, 0]
    want = torch.tensor([0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log()), 2.0])
    want[1] = torch.tensor(2.0).log()
    torch.testing.assert_close(kl(a, b), want)


def test_majority_and_wilson():
    assert majority(["red", "Red", "blue"]) == pytest.approx(2 / 3)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_pairs_count_changes_only():
    pair = Paired.of([True] * 6 + [False], [False] * 5 + [True, True])
    assert (pair.lost, pair.won) == (5, 1)
    assert pair.difference == pytest.approx(-4 / 7)
    assert pair.p == pytest.approx(2 * 7 / 64)


def test_paired_interval_is_wide_by_its_textbook_formula():
    """Mean and standard error of the differences -1, 0, +1 of single questions, at 95 %."""
    first = [True] * 30 + [False] * 10 + [True] * 60
    second = [False] * 30 + [True] * 10 + [True] * 60
    pair = Paired.of(first, second)
    changes = torch.tensor(second).double() - torch.tensor(first).double()
    want = 1.959964 * changes.std(correction=0).item() / math.sqrt(len(first))
    assert pair.half_width == pytest.approx(want)
    assert pair.half_width == pytest.approx(0.1176, abs=1e-4)
    assert Paired.of([], []).half_width == 1
    assert Paired.of([True] * 9, [True] * 9).half_width == 0


def test_report_shows_the_paired_interval_in_points():
    pair = Paired(asked=100, lost=30, won=10)
    line = Line(("random", 0.5), 100, 0.5, (0.4, 0.6), pair, 1.0, *[None] * 6)
    assert ">-20.0 ± 11.8</span>" in _number_row(line)
