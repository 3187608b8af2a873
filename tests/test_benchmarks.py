"""The page of measurements says what the result files say."""

import importlib.util
import json
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


def test_every_family_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    towers = {n for n, kind in FAMILIES.items() if issubclass(kind, PlainEncoder)}
    assert set(result["rows"]) >= set(FAMILIES) - towers
