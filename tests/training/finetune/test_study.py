"""The page on training says what the study's result file says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "convergence_figure.py"
    sys.path.insert(0, str(path.parent))  # where what it imports lies
    spec = importlib.util.spec_from_file_location("convergence_figure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_curves_are_made_from_the_results(script):
    result = json.loads(script.RESULT.read_text())
    page = script.PAGE.read_text()
    assert page == script.page(page, result), "run python benchmarks/convergence_figure.py"
    assert script.FIGURE.read_text() == script.figure(result)


def test_every_arm_has_every_seed_and_asks_as_many_questions(script):
    arms = json.loads(script.RESULT.read_text())["arms"]
    for arm in ("full", "pyramiddrop"):
        assert [a["seed"] for a in arms if a["arm"] == arm] == [0, 1, 2]
    asked = {count["all"][1] for a in arms for count in a["answers"].values()}
    assert asked == {1200}
    assert {a["curve"][-1]["step"] for a in arms} == {250}
