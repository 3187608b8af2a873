"""Answers and statistics."""

import html
import math
import re

import pytest
import torch

from foveate.bench.judge import is_right, kl, majority
from foveate.bench.report import TERMS, Facts, _number_row, write
from foveate.bench.stats import Paired, wilson
from foveate.bench.summary import Line, Summary
from foveate.bench.svg import pareto


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


def line_at(name, keep, accuracy, flops):
    pairs = Paired.of([True], [True])
    rest = dict.fromkeys(("agreement", "kl", "recall", "hit", "tokens", "kv_bytes"), None)
    return Line((name, keep), 9, accuracy, (0.0, 1.0), pairs, flops=flops, **rest)


def test_labels_of_the_plot_cover_neither_each_other_nor_a_point():
    lines = [line_at(f"method-{n}", 0.25, 0.5 + n % 3 / 50, 0.4 + n % 4 / 100) for n in range(12)]
    drawn = pareto(lines, lines[:1], line_at("none", None, 0.6, 1.0), {})
    found = re.findall(r'<text class="tag[^"]*" x="([\d.]+)" y="([\d.]+)">([^<]+)<', drawn)
    assert len(found) == len(lines)
    boxes = [
        (float(x), float(y), float(x) + 6.2 * len(text), float(y) + 12) for x, y, text in found
    ]
    for number, a in enumerate(boxes):
        for b in boxes[:number]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_axes_that_begin_elsewhere_say_so():
    unpruned = line_at("none", None, 0.9, 1.0)
    assert "begins at 80, not at 0" in pareto([line_at("a", 0.5, 0.85, 0.05)], [], unpruned, {})
    drawn = pareto([line_at("a", 0.5, 0.05, 0.05)], [], unpruned, {})
    assert "not at 0" not in drawn


def test_terms_are_explained_in_the_report(tmp_path):
    path = tmp_path / "r.html"
    write(path, Summary([], {}), Facts("m", "c", 0))
    page = path.read_text()
    for term, said in TERMS.items():
        assert f"<dt>{term}</dt><dd>{html.escape(said)}</dd>" in page
    assert "0 cells, 0 tasks" in page
