"""Every notebook of examples/ runs offline, in time, and prints what it holds."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "examples.py"))


def held(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_holds(path):
    assert SCRIPT["differences"](held(path), SCRIPT["run"](path)) == []


def test_a_changed_output_is_told():
    notebook = held(ROOT / "examples" / "quickstart.ipynb")
    outputs = [cell["outputs"] for cell in SCRIPT["code_cells"](notebook)]
    assert SCRIPT["differences"](notebook, outputs) == []
    changed = [*outputs[:-1], []]
    (said,) = SCRIPT["differences"](notebook, changed)
    assert said.startswith(f"cell {len(outputs)}: holds ['<picture>']")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_names_its_model_once(path):
    notebook = held(path)
    assert path.stat().st_size < 200_000
    assert len(notebook["cells"]) <= 12
    code = "\n".join("".join(cell["source"]) for cell in SCRIPT["code_cells"](notebook))
    assert len(re.findall(r"^MODEL = ", code, re.MULTILINE)) == 1


def test_the_page_links_every_notebook():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    linked = re.findall(r"\(\.\./examples/([\w]+\.ipynb)\)", page)
    assert sorted(linked) == [path.name for path in NOTEBOOKS]
