"""Who really beats whom: exact tests of McNemar with Holm's correction, and who shows them."""

import json
import random
from fractions import Fraction
from math import comb

import pytest

from foveate.bench.duels import Duel, budgets, chance, counted, duels, ranking
from foveate.bench.duels_page import TERMS, body, markdown
from foveate.bench.report import Facts, write
from foveate.bench.stats import Paired, holm
from foveate.bench.summary import Summary
from foveate.cli.bench_table import write_table


@pytest.mark.parametrize(
    ("won", "lost", "want"),
    [
        (5, 1, 14 / 64),  # 2 (1 + 6) of 2^6
        (9, 2, 134 / 2048),  # 2 (1 + 11 + 55) of 2^11
        (2, 9, 134 / 2048),
        (0, 10, 2 / 1024),
        (3, 3, 1.0),  # 2 (1 + 6 + 15 + 20) of 2^6 is more than everything
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_as_by_hand(won, lost, want):
    assert Paired(500, lost, won).p == pytest.approx(want, rel=1e-12)


def test_mcnemar_is_exact_for_thousands_of_changes():
    tail = sum(Fraction(comb(2500, k), 2**2500) for k in range(1151))
    assert Paired(9000, 1350, 1150).p == pytest.approx(float(2 * tail), rel=1e-12)
    assert 0 < Paired(9000, 1150, 1350).p < 1e-4
    assert Paired(9000, 4000, 0).p == 0  # 2 ** -3999 is less than any float


def test_holm_is_as_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


def rejected(chances, level):
    """Holm's procedure as he tells it: the smallest is held against level / m, and so on, until one
    is too large; it and all larger ones stand.
    """
    left = sorted(range(len(chances)), key=lambda n: chances[n])
    out = set()
    while left and chances[left[0]] <= level / len(left):
        out.add(left.pop(0))
    return out


def test_holm_rejects_what_its_procedure_does():
    draw = random.Random(0)
    for _ in range(200):
        chances = [draw.choice((draw.random(), draw.random() / 50)) for _ in range(9)]
        for level in (0.01, 0.05, 0.2):
            adjusted = holm(chances)
            assert {n for n, p in enumerate(adjusted) if p <= level} == rejected(chances, level)


def cell(method, right, task="counting", keep=0.25, **more):
    """One row of the results file, of the answers that are right."""
    n = len(right)
    return {
        "method": method, "keep": None if method == "none" else keep, "task": task,
        "status": "done", "error": "", "n": n, "right": sum(right), "accuracy": sum(right) / n,
        "majority": 0.1, "answers": [{"right": bool(x)} for x in right], "agreement": 1.0,
        "kl": 0.0, "recall": None, "hit": None, "tokens_ratio": 0.25, "flops_before": 4,
        "flops_after": 1, "kv_bytes_before": 4, "kv_bytes_after": 1, "seconds": 0.0, "notes": [],
        "survival": {"images": 0}, "versions": "{}", "machine": "", "fingerprint": "",
        "finished": "", "samples": n, "seed": 0, "split": "test", **more,
    }  # fmt: skip


def first(n, total=40):
    """The first `n` questions are answered correctly."""
    return [i < n for i in range(total)]


@pytest.fixture
def summary():
    rows = [cell("none", first(40)), cell("fastv", first(30)), cell("divprune", first(38)),
            cell("random", first(8))]  # fmt: skip
    return Summary(rows, dict.fromkeys(("fastv", "divprune", "random"), "llm"))


def test_pairs_are_those_of_the_budget_adjusted_together(summary):
    assert [name for name, _ in ranking(summary, 0.25)] == ["none", "divprune", "fastv", "random"]
    found = duels(summary, 0.25)
    assert len(found) == 6
    plain = {(d.first[0], d.second[0]): (d.paired.won, d.paired.lost) for d in found}
    assert plain["none", "fastv"] == (10, 0)
    assert plain["divprune", "random"] == (30, 0)
    by_names = {(d.first[0], d.second[0]): d for d in found}
    # 2 / 2^8 of divprune against fastv is the fifth of six, 2 / 2^2 of none against it the last.
    assert by_names["divprune", "fastv"].p == pytest.approx(2 * 2 / 2**8)
    assert by_names["none", "divprune"].p == pytest.approx(0.5)
    assert by_names["none", "fastv"].p == pytest.approx(3 * 2 / 2**10)
    assert [d.real for d in found].count(True) == 5
    assert by_names["divprune", "fastv"].paired.difference == pytest.approx(0.2)
    assert counted(found) == "5 of 6 pairs really differ (adjusted p < 0.05)."


def test_what_is_real_alone_need_not_be_so_among_many():
    """6 against 0 has p = 1 / 32, but not after Holm's correction for three pairs."""
    rows = [cell("none", first(40)), cell("fastv", first(34))]
    (alone,) = duels(Summary(rows, {}), 0.25)
    assert alone.real
    many = duels(Summary([*rows, cell("divprune", first(37))], {}), 0.25)
    assert not any(d.real for d in many)
    (same,) = [d for d in many if (d.first, d.second) == (alone.first, alone.second)]
    assert (same.paired, same.p) == (alone.paired, pytest.approx(3 / 32))


def test_equal_answers_are_a_tie():
    rows = [cell("none", first(30)), cell("fastv", first(20)), cell("divprune", first(20))]
    tie = duels(Summary(rows, {}), 0.25)[-1]
    assert (tie.first[0], tie.second[0], tie.p) == ("divprune", "fastv", 1.0)
    assert (tie.paired.difference, tie.real) == (0, False)
    assert "| 2 divprune | **-25** |  | 0 |" in markdown(*both(rows))


def both(rows):
    summary = Summary(rows, {})
    return duels(summary, 0.25), ranking(summary, 0.25)


def apart():
    """`fastv` and `divprune` were refused on each other's task, so they share no question."""
    refused = {"status": "refused", "error": "not here"}
    return [
        cell("none", first(40), "counting"), cell("none", first(40), "position"),
        cell("fastv", first(30), "counting"), cell("fastv", first(1), "position", **refused),
        cell("divprune", first(1), "counting", **refused), cell("divprune", first(20), "position"),
    ]  # fmt: skip


def test_two_with_no_question_in_common_are_not_tested():
    found = duels(Summary(apart(), {}), 0.25)
    (none,) = [d for d in found if d.paired.asked == 0]
    assert (none.p, none.real) == (None, False)
    # The other two are adjusted for two tests, not for three.
    assert sorted(d.p for d in found if d is not none) == pytest.approx([4 / 2**20, 2 / 2**10])
    assert counted(found) == "2 of 2 pairs really differ (adjusted p < 0.05)."
    assert "no question in common" in body(Summary(apart(), {}))
    assert " - |" in markdown(*both(apart()))


def test_only_common_questions_count():
    rows = [*apart(), cell("random", first(10), "counting")]
    found = duels(Summary(rows, {}), 0.25)
    asked = {frozenset((d.first[0], d.second[0])): d.paired.asked for d in found}
    assert asked[frozenset(("none", "random"))] == 40
    assert asked[frozenset(("fastv", "random"))] == 40
    assert asked[frozenset(("divprune", "random"))] == 0


def test_the_better_one_on_common_questions_comes_first():
    """`divprune` has the higher share over its two tasks, but `fastv` wins where both ran."""
    rows = [
        cell("none", first(40), "counting"), cell("none", first(40), "position"),
        cell("fastv", first(20), "counting"),
        cell("divprune", first(10), "counting"), cell("divprune", first(40), "position"),
    ]  # fmt: skip
    summary = Summary(rows, {})
    assert [c[0] for c in ranking(summary, 0.25)] == ["none", "divprune", "fastv"]
    duel = duels(summary, 0.25)[-1]
    assert (duel.first[0], duel.paired.won, duel.paired.lost) == ("fastv", 10, 0)
    assert "| 2 divprune | **-38** |  | **-25** |" in markdown(*both(rows))


def test_budgets_are_apart():
    rows = [cell("none", first(40)), *(cell("fastv", first(9), keep=k) for k in (0.5, None))]
    summary = Summary(rows, {})
    assert budgets(summary) == [0.5, None]
    assert ranking(summary, 0.5) == [("none", None), ("fastv", 0.5)]
    assert ranking(summary, None) == [("none", None), ("fastv", None)]
    assert [len(duels(summary, keep)) for keep in budgets(summary)] == [1, 1]
    assert budgets(Summary(rows[:1], {})) == []
    assert "Nothing can be compared" in body(Summary(rows[:1], {}))


def test_the_report_shows_and_explains_them(summary, tmp_path):
    write(tmp_path / "r.html", summary, Facts("m", "c", 4))
    page = (tmp_path / "r.html").read_text()
    assert "5 of 6 pairs really differ" in page
    tip = "divprune against fastv: +20.0 ± 12.4, adjusted p = 0.0156"
    assert f'<td class="good" title="{tip}"><b>+20</b></td>' in page
    assert f'<td class="bad" title="{tip}"><b>-20</b></td>' in page
    assert '<td class="faint" title="all tokens against divprune' in page
    assert "<td>all tokens really beats random</td><td>+80.0 ± 12.4</td><td>&lt; 0.001" in page
    assert "<td>all tokens against divprune</td>" in page
    assert page.index("really beats random") < page.index("all tokens against divprune</td>")
    assert all(f"<dt>{term}</dt>" in page for term in TERMS)


def test_files_say_who_beats_whom(summary, tmp_path):
    for kind in ("md", "json", "csv"):
        write_table(tmp_path / f"t.{kind}", summary)
    told = (tmp_path / "t.md").read_text()
    assert "## Who really beats whom, keep = 0.25" in told
    assert "| 2 divprune | -5 |  | **+20** | **+75** |" in told
    assert "beats" not in (tmp_path / "t.csv").read_text()
    kept = json.loads((tmp_path / "t.json").read_text())
    assert [line["method"] for line in kept["lines"]] == ["none", "divprune", "fastv", "random"]
    (pair,) = [p for p in kept["pairs"] if (p["first"], p["second"]) == ("divprune", "fastv")]
    assert pair == {
        "keep": 0.25, "first": "divprune", "second": "fastv", "asked": 40, "won": 8, "lost": 0,
        "difference": 0.2, "half_width": pytest.approx(0.12396, abs=1e-5), "p": 2 / 2**8,
        "p_adjusted": 4 / 2**8, "real": True,
    }  # fmt: skip


def test_probabilities_are_short():
    found = [chance(p) for p in (None, 1.0, 0.25, 0.0503, 0.0123456, 0.001, 0.0009)]
    assert found == ["-", "1.000", "0.250", "0.0503", "0.0123", "0.0010", "< 0.001"]


def test_a_difference_is_real_below_the_level_only():
    pair = Paired(9, 0, 6)
    assert [Duel(("a", 1), ("b", 1), pair, p).real for p in (0.0499, 0.05, None)] == [True, 0, 0]
