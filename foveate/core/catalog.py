"""The catalogue: slug, stage, needs and paper of methods, read without importing them.

A method's file says all of that in `@register(...)`, with literals, so its source is enough.
Methods of other packages are imported, and with them all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import entry_points
from typing import Any

from foveate.core.step import STAGES, Stage


@dataclass(frozen=True)
class Entry:
    """What a listing shows of a method; see `foveate.core.register`."""

    slug: str
    stage: Stage
    needs: tuple[str, ...] = ()
    paper: str = ""


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

    classes = [get_method(name) for name in list_methods()]
    return [Entry(cls.slug, cls.stage, cls.needs, cls.paper) for cls in classes]


def _built_in() -> Iterator[Entry]:
    """Methods of the files in `foveate/methods`."""
    for file in (resources.files("foveate") / "methods").iterdir():
        if not file.name.endswith(".py"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                    yield _entry(call)


def _entry(call: ast.Call) -> Entry:
    """What `@register(...)` says."""
    fields: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return Entry(ast.literal_eval(call.args[0]), **fields)
