"""Imports run one way: from packages further up to those below, and never in a circle.

Every import counts, also those within functions and those for annotations only.
"""

import ast
import itertools
import runpy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import foveate

ROOT = Path(foveate.__file__).parent
ORDER = runpy.run_path(str(ROOT.parent / "scripts" / "house.py"))["ORDER"]
"""Parts of the package, the lowest first."""
METHODS_SEE = {"errors", "io", "core", "ops", "methods"}


@dataclass(frozen=True)
class Import:
    """One module imports another.

    Args:
        source: the module that imports.
        target: the module that is imported.
    """

    source: str
    target: str


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of a package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: Iterable[str]) -> Iterator[Import]:
    """Imports of modules of the same package, wherever they stand in the file."""
    package, known = name.partition(".")[0], set(known)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for target in _targets(node, known):
            if target.partition(".")[0] == package:
                yield Import(name, target)


def _targets(node: ast.AST, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports within the package are absolute"
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in known else str(node.module) for name in full]
    return []


def in_circles(imports: Iterable[Import]) -> set[Import]:
    """The imports that are part of a circle: whose target leads back to their source."""
    imports = set(imports)
    graph: dict[str, set[str]] = {}
    for entry in imports:
        graph.setdefault(entry.source, set()).add(entry.target)
    return {entry for entry in imports if entry.source in _reached(graph, entry.target)}


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached, waiting = {start}, [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def part_of(module: str) -> str:
    """The part of the package that a module belongs to; `foveate` for the package itself."""
    return [*module.split("."), "foveate"][1]


@pytest.fixture(scope="module")
def imports() -> set[Import]:
    """All imports within foveate."""
    known = modules(ROOT)
    found = (imports_of(name, path, known) for name, path in known.items())
    return set(itertools.chain.from_iterable(found))


def test_no_modules_import_each_other(imports):
    """Neither where an import waits within a function, nor for annotations."""
    assert in_circles(imports) == set()


def test_no_import_runs_upwards(imports):
    """A part of the package imports those below it in `ORDER`."""
    rank = {part: number for number, part in enumerate(ORDER)}
    upwards = [e for e in imports if rank[part_of(e.target)] > rank[part_of(e.source)]]
    assert not upwards, upwards


def test_methods_import_what_methods_are_made_of(imports):
    """A method knows nothing of the engine that runs it."""
    seen = {part_of(e.target) for e in imports if part_of(e.source) == "methods"}
    assert seen <= METHODS_SEE


def test_every_part_has_its_place():
    """`ORDER` names all parts of the package, and no others."""
    assert {part_of(name) for name in modules(ROOT)} == set(ORDER)
