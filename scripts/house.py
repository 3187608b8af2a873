"""Figures of the structure: `python scripts/house.py [--long] [--markdown | --write | --check]`.

`--markdown` prints the table that docs/architecture.md quotes, `--write` renews it there with the
lines of what is read first, and `--check` fails where a figure of the source has changed. Figures
of a run (calls, moves between files) depend on the versions of Python and transformers, so
`--check` leaves them out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "foveate"
PAGE = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"(?<=\| figure \| now \|\n\|---\|---\|\n)(?:\|.*\n)*")
READING = re.compile(r"^(\| \d \| .*?\| `([\w/]+\.py)` `(\w+)` \| )(\d+)", re.MULTILINE)
LONG = 40
ORDER = (
    "lazy", "errors", "io", "tiny", "core", "ops", "record", "families", "signals", "engine",
    "measure", "report", "loading", "run", "methods", "calibration", "training", "bench", "tune",
    "large", "streaming", "robots", "voxels", "testing", "foveate", "integrations", "batch",
    "serve", "cli", "__main__",
)  # fmt: skip
"""Parts of the package, the lowest first: each may import itself and those before it. `foveate`
stands for the names that the library exports.
"""
COMPREHENSIONS = {"<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>"}


# -- the source


@functools.cache
def sources(folder: Path) -> dict[Path, str]:
    """Every module below a folder, with its text."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


@functools.cache
def tree(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def lines(paths: list[Path]) -> int:
    """Lines of some modules, blank ones and comments included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    named = {}
    for path in sources(PACKAGE):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module in known:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in known else node.module


def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports anywhere: at the top, in functions, for types alone."""
    known = modules()
    return {
        name: {to for node in ast.walk(tree(path)) for to in imported(node, known)} - {name}
        for name, path in known.items()
    }


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Modules that a module imports, directly or through others."""
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        todo += edges[name] - seen if name not in seen else ()
        seen.add(name)
    return seen


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules in which each imports all others, directly or through others."""
    after = {name: reachable(edges, name) for name in edges}
    groups = {
        tuple(sorted(other for other in after[name] if name in after[other]))
        for name in edges
        if name in after[name]
    }
    return [list(group) for group in sorted(groups)]


def height(module: str) -> int:
    """Where a module's package stands in `ORDER`."""
    package = [*module.split("."), "foveate"][1]
    if package not in ORDER:
        sys.exit(f"foveate/{package} has no place in the order of packages: add it to ORDER")
    return ORDER.index(package)


def upwards(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a module whose package is higher."""
    return [
        f"{name} -> {to}"
        for name in edges
        for to in sorted(edges[name])
        if height(to) > height(name)
    ]


def long_functions() -> list[str]:
    """Functions over 40 lines, docstring included, the longest first."""
    found = []
    for path in sources(PACKAGE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONG:
                    found.append((-length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return [f"{-length:4} {what}" for length, what in sorted(found)]


def step_flags() -> list[str]:
    """Boolean fields of `Step`."""
    body = next(
        node.body
        for node in ast.walk(tree(PACKAGE / "core" / "step.py"))
        if isinstance(node, ast.ClassDef) and node.name == "Step"
    )
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return [ast.unparse(f.target) for f in fields if ast.unparse(f.annotation) == "bool"]


def named_in(path: Path) -> set[str]:
    """Strings of a module, and the functions that it defines."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


def signal_files() -> dict[str, int]:
    """Decoder signal -> modules outside `methods` that define it, or name it in a string."""
    from foveate.signals import SIGNALS

    names = [name for name, signal in SIGNALS.items() if signal.source == "decoder"]
    files: Counter[str] = Counter()
    for path in sources(PACKAGE):
        if PACKAGE / "methods" not in path.parents:
            files.update(named_in(path))
    return {name: files[name] for name in names}


# -- a run


class Route:
    """Which files of the package a run visits: a profile of its function calls.

    A move is a call whose caller, the nearest one within the package, is in another file.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.calls = self.moves = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call of a function of the package."""
        if event != "call" or not _is_function(frame):
            return
        file, caller = frame.f_code.co_filename, frame.f_back
        while caller is not None and not _is_function(caller):
            caller = caller.f_back
        self.calls += 1
        self.files.add(file)
        self.moves += caller is not None and caller.f_code.co_filename != file

    @classmethod
    def of(cls, run: Callable[[], Any]) -> Route:
        """The route of a run; what is made once for all runs has been made by one before."""
        run()
        route = cls()
        sys.setprofile(route)
        try:
            run()
        finally:
            sys.setprofile(None)
        return route


def _is_function(frame: FrameType) -> bool:
    """Whether a frame is a function of the package; comprehensions belong to what they are in."""
    inside = frame.f_code.co_filename.startswith(f"{PACKAGE}/")
    return inside and frame.f_code.co_name not in COMPREHENSIONS


def routes() -> dict[str, Route]:
    """Routes of one prefill of the tiny model with PyramidDrop, and of one session without it."""
    import torch

    import foveate
    from foveate.testing import models

    model = models.llava()
    inputs = models.prompts(model, [[8, 12]])

    def enter_and_leave() -> None:
        with foveate.use(model, "pyramiddrop"):
            pass

    with torch.no_grad():
        with foveate.use(model, "pyramiddrop"):
            prefill = Route.of(lambda: model(**inputs))
        return {"one prefill": prefill, "one session": Route.of(enter_and_leave)}


# -- the table


def thousands(count: int) -> str:
    """A number of lines, to the nearest hundred."""
    return f"{count / 1000:.1f}k"


def figures() -> dict[str, str]:
    """Figures of the source."""
    edges, signals = graph(), signal_files().values()
    engine = list(sources(PACKAGE / "engine"))
    extras = [path for path in engine if PACKAGE / "engine" / "extensions" in path.parents]
    core = [path for path in engine if path not in extras]
    loose = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    package = list(sources(PACKAGE))
    return {
        "import cycles": str(len(circles(edges))),
        "upward imports": str(len(upwards(edges))),
        "loose modules at the top": str(len(loose)),
        "engine without extensions": f"{len(core)} files, {thousands(lines(core))} lines",
        "engine extensions": f"{len(extras)} files, {thousands(lines(extras))} lines",
        "package": f"{len(package)} files, {thousands(lines(package))} lines",
        "recipes beside the package": f"{thousands(lines(list(sources(ROOT / 'recipes'))))} lines",
        f"functions over {LONG} lines": str(len(long_functions())),
        "boolean flags of `Step`": str(len(step_flags())),
        "files that name a decoder signal": f"{min(signals)} to {max(signals)}",
    }


def measured() -> dict[str, str]:
    """Figures of a run."""
    return {
        f"{name}, as run": f"{len(r.files)} files, {r.moves} moves between them, {r.calls} calls"
        for name, r in routes().items()
    }


def rows(found: dict[str, str]) -> str:
    """Rows of the table."""
    return "".join(f"| {name} | {value} |\n" for name, value in found.items())


def length(file: str, name: str) -> int:
    """Lines of a class or a function of the package, to the nearest ten."""
    for node in tree(PACKAGE / file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return round((node.end_lineno or 0) - node.lineno + 1, -1)
    sys.exit(f"foveate/{file} has no {name}: mend the order of reading in docs/architecture.md")


def renewed(text: str, found: dict[str, str]) -> str:
    """The page with these figures, and with lines as they are now."""
    text = READING.sub(lambda row: f"{row[1]}{length(row[2], row[3])}", text)
    return TABLE.sub(lambda _: rows(found), text, count=1)


def check() -> None:
    """Fail where the page quotes a figure of the source that is no longer so."""
    text = PAGE.read_text(encoding="utf-8")
    quoted = set(TABLE.search(text)[0].splitlines())  # type: ignore[index]
    stale = [row for row in rows(figures()).splitlines() if row not in quoted]
    for row in READING.finditer(text):
        if abs(int(row[4]) - (now := length(row[2], row[3]))) > 10:
            stale.append(f"{row[2]} {row[3]}: {now} lines")
    if stale:
        sys.exit(
            "docs/architecture.md is out of date: run `python scripts/house.py --write`; now\n"
            + "\n".join(stale)
        )


def details() -> None:
    """Print what the figures count."""
    edges = graph()
    for circle in circles(edges):
        print("circle:", ", ".join(circle))
    for step in upwards(edges):
        print("upwards:", step)
    for name, count in signal_files().items():
        print(f"signal: {name} in {count}")
    print("flags:", ", ".join(step_flags()))
    print(*long_functions(), sep="\n")


def main() -> None:
    """Print, write or check the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--long", action="store_true", help="list what is counted as well")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--write", action="store_true", help="renew the table in the page")
    parser.add_argument("--check", action="store_true", help="compare the page with the source")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if chosen.check:
        return check()
    found = figures() | measured()
    if chosen.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(renewed(text, found), encoding="utf-8")
    elif chosen.markdown:
        print("| figure | now |\n|---|---|\n" + rows(found), end="")
    else:
        for name, value in found.items():
            print(f"{name:34} {value}")
    if chosen.long:
        details()


if __name__ == "__main__":
    main()
