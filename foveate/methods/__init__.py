"""One file per paper. Every module here registers its methods when the package is imported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from foveate.core import Method

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    for _name, _value in vars(_module).items():
        if inspect.isclass(_value) and issubclass(_value, Method) and "slug" in vars(_value):
            globals()[_name] = _value


def __getattr__(name: str) -> Any:
    known = sorted(k for k, v in globals().items() if inspect.isclass(v) and hasattr(v, "slug"))
    raise AttributeError(f"foveate.methods has no {name!r}; it has {', '.join(known)}")
