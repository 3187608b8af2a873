"""The catalogue: what methods say of themselves, read without importing them.

A method's file says it in `@register(...)`, with literals, and quotes the title of its paper in its
docstring, so its source is enough. Methods of other packages are imported, and with them all.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import entry_points
from typing import Any

from foveate.core.step import STAGES, Stage


@dataclass(frozen=True)
class Entry:
    """What a listing shows of a method; see `foveate.core.register`.

    `title` is that of the paper, as the docstring of the method's file quotes it:
    `Paper: Doe et al., "Title", ...`.
    """

    slug: str
    stage: Stage
    needs: tuple[str, ...] = ()
    paper: str = ""
    does: str = ""
    title: str = ""


_TITLE = re.compile(r'^Paper:[^"]*"([^"]+)"', re.MULTILINE)


def catalog() -> list[Entry]:
    """All methods, in the order of the stream: by stage, then by name.

    Raises:
        FoveateError: a package's entry point cannot be loaded.
    """
    found = _registered() if entry_points(group="foveate.methods") else list(_built_in())
    return sorted(found, key=lambda entry: (STAGES.index(entry.stage), entry.slug))


def _registered() -> list[Entry]:
    """Methods of the registry, which imports them."""
    from foveate.core.registry import get_method, list_methods  # late: torch comes with them

    found = []
    for cls in map(get_method, list_methods()):
        title = _title(inspect.getdoc(inspect.getmodule(cls)))
        found.append(Entry(cls.slug, cls.stage, cls.needs, cls.paper, cls.does, title))
    return found


def _built_in() -> Iterator[Entry]:
    """Methods of the files in `foveate/methods`."""
    for file in (resources.files("foveate") / "methods").iterdir():
        if not file.name.endswith(".py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        title = _title(ast.get_docstring(tree))
        for node in tree.body:
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                    yield _entry(call, title)


def _entry(call: ast.Call, title: str) -> Entry:
    """What `@register(...)` says."""
    fields: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return Entry(ast.literal_eval(call.args[0]), title=title, **fields)


def _title(doc: str | None) -> str:
    """The title of the paper that a docstring names, on one line."""
    found = _TITLE.search(doc or "")
    return " ".join(found[1].split()) if found else ""
