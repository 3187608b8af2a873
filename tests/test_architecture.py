"""docs/architecture.md speaks of files and names that there are, with figures that hold."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)
PATHS = sorted({word for word in CODE if re.fullmatch(r"[\w./]+(\.py|\.json|/)", word)})
NAMES = sorted({word for word in CODE if re.fullmatch(r"[A-Za-z]\w*", word)} - {"foveate"})
PAIRS = re.findall(r"`([\w/]+\.py)` `(\w+)`", PAGE) + [
    (path, name) for name, path in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", PAGE)
]


def defined(path: Path) -> set[str]:
    """Classes, functions and variables of a module, and those within them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@pytest.fixture(scope="module")
def everything() -> set[str]:
    return set().union(*(defined(path) for path in (ROOT / "foveate").rglob("*.py")))


def house(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/house.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", PATHS)
def test_every_file_exists(path):
    found = [root / path for root in (ROOT / "foveate", ROOT) if (root / path).exists()]
    assert found, f"there is no {path}"
    assert path.endswith("/") == found[0].is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_defined(name, everything):
    assert name in everything


@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_names_are_in_their_files(path, name):
    assert name in defined(ROOT / "foveate" / path)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (DOCS / target).is_file()
    for page in (ROOT / "README.md", DOCS / "how-it-works.md"):
        assert "architecture.md)" in page.read_text(encoding="utf-8")


def test_every_package_has_its_row():
    rows = PAGE.partition("## Folders")[2].partition("\n## ")[0]
    packages = {path.parent.name for path in (ROOT / "foveate").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`(\w+)/`", rows))


def test_reading_is_short():
    counts = [int(n) for n in re.findall(r"^\| \d \|.*?\| (\d+) \|", PAGE, re.MULTILINE)]
    assert len(counts) >= 8
    assert min(counts) > 0
    assert sum(counts) <= 1500
    assert len(PAGE.splitlines()) <= 150


def test_figures_are_those_of_the_source():
    done = house("--check")
    assert done.returncode == 0, done.stderr


def test_image_is_what_the_script_draws(tmp_path):
    """And the files that it names exist."""
    drawn = (DOCS / "architecture.svg").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "scripts" / "draw_architecture.py"))
    script["main"].__globals__["OUT"] = tmp_path / "drawn.svg"
    script["main"]()
    assert (tmp_path / "drawn.svg").read_text(encoding="utf-8") == drawn
    for path in re.findall(r">([\w/]+(?:\.py|/))<", drawn):
        assert (ROOT / "foveate" / path).exists()
