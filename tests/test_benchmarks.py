"""The page of measurements says what the result files say."""

import importlib.util
import json
import sys
from pathlib import Path

from foveate.models import FAMILIES
from foveate.models.plain import PlainEncoder

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_results():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page == table.page(), "run python benchmarks/table.py"


def test_the_published_figures_are_those_of_the_script():
    published = _script("published")
    page = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    found = page.split(published.BEGIN)[1].split(published.END)[0]
    assert found == published.table(), "run python benchmarks/published.py --write"
    stages = {row.what: row for row in published.pyramiddrop()}
    for number, flops in ((3, 2.13), (4, 1.78), (5, 1.38)):
        row = stages[f"LLaVA-1.5-7B, {number} stages"]
        assert abs(row.ours - flops) < 0.02
    assert all(row.why for row in published.rows())


def _script(name):
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    towers = {n for n, kind in FAMILIES.items() if issubclass(kind, PlainEncoder)}
    assert set(result["rows"]) >= set(FAMILIES) - towers
