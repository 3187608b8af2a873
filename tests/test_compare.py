"""The page on other projects says what its data says, and the data says where it was seen."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = json.loads((ROOT / "scripts" / "compare.json").read_text(encoding="utf-8"))
PROJECTS = DATA["projects"]
LINES = re.compile(r"[\w.+/-]+(#L\d+(-L\d+)?)?")


@pytest.fixture(scope="module")
def script():
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location(
        "compare_page", ROOT / "scripts" / "compare_page.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_data(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "run python scripts/compare_page.py"


def test_foveate_answers_every_question_with_files_that_exist(script):
    own = script.own()
    assert list(own) == list(DATA["questions"])
    for short, _, seen in own.values():
        assert short
        assert short != "not found"
        assert seen
        assert all((ROOT / path).exists() for path in seen)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda one: one["name"])
def test_every_fact_says_where_it_was_seen(project):
    assert re.fullmatch(r"[0-9a-f]{9,40}", project["commit"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", project["date"])
    assert set(project["facts"]) <= set(DATA["questions"])
    if project["group"] == "systems":
        assert set(project["facts"]) == set(DATA["questions"])
    for short, _, seen in project["facts"].values():
        assert seen or short == "not found"
        assert all(LINES.fullmatch(path) for path in seen)
