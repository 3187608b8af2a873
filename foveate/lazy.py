"""Packages whose names are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that imports its names late.

    Modules of the package are attributes too, as if they had been imported.

    Args:
        package: its `__name__`.
        names: module -> the names that the package takes from it.
    """
    home = {name: module for module, of in names.items() for name in of}

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in home:
            value = getattr(import_module(home[name]), name)
        else:
            value = _module(package, name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        here = vars(sys.modules[package])
        return sorted({*here, *here.get("__all__", ())})

    return __getattr__, __dir__


def _module(package: str, name: str) -> Any:
    """A module of the package.

    Raises:
        AttributeError: there is none of that name.
    """
    path = f"{package}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
