"""Answers and statistics."""

import pytest
import torch

from foveate.bench.judge import is_right, kl, majority
from foveate.bench.stats import Paired, wilson


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
