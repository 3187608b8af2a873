"""The headline cells of docs/results.md: parts are pooled, and the result is what the page says."""

import importlib
from pathlib import Path

import pytest

from foveate.bench.settings import cells
from foveate.bench.stats import Paired, holm

ROOT = Path(__file__).parent.parent


@pytest.fixture
def headline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("headline")


@pytest.fixture
def page(headline):
    return importlib.import_module("_headline_table")


def rows(headline, part, right, versions="new"):
    """Every cell of a part; of two questions, methods answer `right` and all tokens both."""
    settings = headline.settings(part)
    for cell in cells(settings):
        said = [True, True] if cell.method == "none" else right
        yield {
            "method": cell.method, "keep": cell.keep, "task": cell.task, "seed": settings.seed,
            "status": "done", "error": "", "n": 2, "right": sum(said), "accuracy": sum(said) / 2,
            "majority": 1.0, "versions": versions, "machine": "m", "fingerprint": "f",
            "finished": str(part), "seconds": 1.0, "survival": {"images": 0},
            "answers": [{"right": r, "answer": a} for r, a in zip(said, "ab", strict=True)],
            "agreement": 1.0, "kl": 0.0, "recall": None, "hit": None, "tokens_ratio": 0.25,
            "flops_before": 4, "flops_after": 1, "kv_bytes_before": 4, "kv_bytes_after": 1,
        }  # fmt: skip


def test_parts_are_pooled_question_by_question(headline):
    found = headline.pool([*rows(headline, 0, [True, False]), *rows(headline, 1, [False, False])])
    tasks = len(headline.TASKS)
    assert found["seeds"] == [0, headline.SAMPLES]
    (line,) = [x for x in found["lines"] if (x["method"], x["keep"]) == ("fastv", 0.25)]
    assert (line["n"], line["accuracy"], line["change"]) == (4 * tasks, 0.25, -0.75)
    pairs = [p for p in found["pairs"] if {p["first"], p["second"]} == {"none", "fastv"}]
    assert [(p["won"], p["lost"], p["asked"]) for p in pairs] == [(3 * tasks, 0, 4 * tasks)] * 2
    assert found["tasks"][0]["n"] == 4
    assert found["tasks"][0]["right"]["fastv 0.25"] == 1


def test_a_part_counts_only_where_all_of_it_was_measured_by_the_same_code(headline):
    whole, begun = rows(headline, 0, [True, False]), list(rows(headline, 1, [True, True]))
    old = rows(headline, 2, [True, True], "old")
    found = headline.pool([*old, *whole, *begun[:-1]])
    assert found["seeds"] == [0]
    assert found["lines"][0]["n"] == 2 * len(headline.TASKS)
    with pytest.raises(SystemExit, match="no part is complete"):
        headline.pool(begun[1:])


def test_parts_share_no_question(headline):
    one, two = headline.settings(0), headline.settings(1)
    assert one.seed + one.samples <= two.seed
    assert (one.methods, one.keeps, one.tasks) == (two.methods, two.keeps, two.tasks)


def test_headline_cells_stand_on_a_thousand_questions_within_two_and_a_half_points(page):
    result = page.load()
    assert len(result["lines"]) == 23
    for line in result["lines"]:
        low, high = line["interval"]
        assert line["n"] >= 1000
        assert (high - low) / 2 <= 0.025


def test_pairs_of_the_result_are_adjusted_together(page):
    for keep in (0.25, 0.125):
        pairs = [p for p in page.load()["pairs"] if p["keep"] == keep]
        assert len(pairs) == 12 * 11 / 2
        alone = [Paired(p["asked"], p["lost"], p["won"]).p for p in pairs]
        assert [p["p_adjusted"] for p in pairs] == pytest.approx(holm(alone))


def test_pairs_that_are_not_told_apart_are_listed(page):
    keys = ("first", "second", "asked", "won", "lost", "p_adjusted")
    pairs = [("a", "b", 100, 60, 20, 0.0123), ("none", "b", 100, 60, 50, 0.2)]
    found = [page.duel(dict(zip(keys, pair, strict=True))) for pair in pairs]
    told = page.told_apart(found)
    assert told.startswith("1 of 2 pairs really differ")
    assert told.count("\n|") == 3
    assert "| all tokens and `b` | +10.0 ± 20.5 | 0.200 | 60 | 50 |" in told
    assert "These do not" not in page.told_apart(found[:1])
