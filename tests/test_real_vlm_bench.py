"""One encoding answers for every method, and the page on the VLM of real parts says what the
result holds.
"""

import importlib
import json

import pytest

from foveate import tiny
from foveate.bench.tasks import get_task
from foveate.core import get_method
from tests.test_benchmarks import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def bench():
    return importlib.import_module("_real_vlm")


@pytest.fixture
def page():
    return importlib.import_module("_real_vlm_page")


def test_answers_of_one_encoding_are_those_of_a_session_each(bench, monkeypatch):
    """Of methods that drop, that merge before the projector, and that leave ragged numbers."""
    model, processor = tiny.load()
    samples = [get_task("attribute").sample(seed) for seed in range(6, 12)]
    names = ("visionzip", "llava-prumerge", "downsample")
    methods = {(name, 0.125): get_method(name)(keep=0.125) for name in names}
    methods["original", 0.125] = get_method("divprune")(keep=0.125, positions="original")
    right, asked = bench.right, []
    monkeypatch.setattr(bench, "right", lambda *given: asked.append(given[3]) or right(*given))
    found = bench.ask(model, processor, samples, methods)
    assert [replay.positions for replay in asked[2:]] == ["renumbered"] * 3 + ["original"]
    tower = model.model.vision_tower
    assert "forward" not in vars(tower)
    for name, method in methods.items():
        assert found[name] == right(model, processor, samples, method), name
    assert found[bench.ALL] == right(model, processor, samples, None)
    assert sum(found[bench.ALL]) > sum(found[bench.BLANK])
    assert len({tuple(row) for row in found.values()}) > 3


def test_rank_correlation_of_known_orders(page):
    assert page.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert page.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert page.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert page.ranks([5, 7, 5, 9]) == [0.5, 2, 0.5, 3]
    assert page.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_the_interval_of_a_correlation_holds_it_and_narrows(page):
    def model(repeats):
        return {f"m{n} @ 0.25": ("1" * n + "0" * (8 - n)) * repeats for n in range(6)}

    names = list(model(1))
    value, low, high = page.correlation(model(3), model(3), names)
    assert value == high == 1
    assert low <= value
    swapped = dict(zip(names, reversed(model(3).values()), strict=True))
    worst, _, top = page.correlation(model(3), swapped, names)
    assert worst == -1
    assert top < low


def test_the_section_tells_what_the_result_holds(page):
    rows = {"none": "1111", "none, of a grey image": "0100"}
    rows |= {"random @ 0.25": "0100", "divprune @ 0.25": "1101"}
    tiny_rows = {**rows, "divprune @ 0.25": "1111"}
    unmoved = {**rows, "divprune, original positions @ 0.25": "0001"}
    alone = {"tome @ 0.25": "0111"}  # which the tiny model refuses
    result = {
        "answers": {
            "real": {
                "attribute": rows | alone, "easy-vqa": rows | alone, "position": unmoved | alone,
            },
            "tiny": {"attribute": tiny_rows, "position": unmoved},
        },
        "keeps": [0.25], "training": {"steps": 12, "cpu_s": 660},
        "machine": {"cpu": "A core", "dtype": "bfloat16", "torch": "2", "transformers": "5"},
    }  # fmt: skip
    said = page.section(result)
    assert "| attribute | 4 | 100.0 (51 to 100) | 25.0 (5 to 70) |" in said
    first = next(line for line in said.splitlines() if line.startswith("| `divprune`"))
    assert "| 75.0 (41 to 93) | +50.0 ± " in first
    assert "| 87.5 (53 to 98) | +62.5 ± " in first
    assert "| `divprune` at 0.25 | 75.0 (30 to 95) | 25.0 (5 to 70) | 75.0" in said
    assert next(x for x in said.splitlines() if x.startswith("| `tome`")).endswith("|  |  |")
    assert "| all of them | 1.00 (" in said
    assert "12 steps of two images with up to 24 questions\neach, in 11 CPU minutes" in said
    assert said.endswith(page.LESSONS)


def test_the_page_holds_the_section_of_the_committed_result(page):
    text = (ROOT / "docs" / "results-real.md").read_text(encoding="utf-8")
    assert page.section(page.load()) in text, "run python benchmarks/quality.py"
    assert json.loads(page.RESULT.read_text())["answers"]["real"]
