"""A YAML file of options of `foveate bench`, so that a campaign can be kept and repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.cli.bounded_yaml import LARGEST, parse_yaml
from foveate.cli.elsewhere import why_absent
from foveate.errors import InputError
from foveate.io.quoting import near, quoted, shown
from foveate.io.reading import read_text, reason


def read_options(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Options by name, as click takes them.

    Args:
        path: a mapping such as `methods: [fastv, divprune]`; a list is joined by commas.
        known: names of options.

    Raises:
        InputError: the file cannot be read, or an option is unknown or neither text nor number.
    """
    known = sorted(known)
    try:
        loaded = parse_yaml(read_text(path, LARGEST))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {shown(path)} as a campaign: {reason(error)}") from None
    if not isinstance(loaded, Mapping):
        raise InputError(f"{shown(path)} must be a mapping of options to values")
    found = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            if why := why_absent("bench", name):
                raise InputError(f"{shown(path)} cannot set {name}: {why}")
            raise InputError(f"unknown key {quoted(key)} in {shown(path)}; {near(key, known)}")
        found[name] = _value(value, f"{name} in {shown(path)}")
    return found


def _value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return ",".join(str(_value(entry, where)) for entry in value)
    if not isinstance(value, str | int | float):
        raise InputError(f"{where} must be text, a number or a list of those, got {quoted(value)}")
    return value
