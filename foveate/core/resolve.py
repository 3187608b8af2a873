"""From what users call a method to methods."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, cast

from foveate.core.method import Method
from foveate.core.registry import get_method
from foveate.core.saving import Saved, from_dict
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import quoted, shown, within
from foveate.io.reading import parse_json, read_text, reason

OneMethod: TypeAlias = "Method | type[Method] | str | os.PathLike[str] | Mapping[str, Any]"
MethodLike: TypeAlias = "OneMethod | Sequence[OneMethod]"
"""A method, its class or its name; what `Method.to_dict` says, or a JSON file that holds it; a
foveate.json; or a list of those."""


def methods_of(given: MethodLike, **fields: Any) -> tuple[Method, ...]:
    """The methods that are meant.

    Args:
        given: see `MethodLike`; a list is in stream order.
        **fields: hyper-parameters, which go with a name or a class.

    Raises:
        FoveateError: it is no such thing, or a list of none; or fields do not fit.
    """
    if fields and not isinstance(given, str | type):
        raise FoveateError(
            f"fields go with a method's name; got {shown(', '.join(fields))} beside "
            f"{quoted(given)}, which has its own"
        )
    if isinstance(given, list | tuple):
        if not given:
            raise FoveateError("an empty list names no method; leave the session out instead")
        for entry in given:
            if isinstance(entry, list | tuple):
                raise FoveateError(f"a list of methods holds no lists, got {quoted(entry)}")
        return tuple(method for entry in given for method in methods_of(entry))
    if isinstance(given, Method):
        return (given,)
    if isinstance(given, Mapping):
        return (from_dict(given),)
    if _is_file(given):
        return saved_of(given, **fields).alone(given)
    if isinstance(given, str):
        return (_make(get_method(given), fields),)
    if isinstance(given, type) and issubclass(given, Method):
        return (_make(given, fields),)
    raise FoveateError(
        "a method is an instance or a class of one, a name that `foveate list` shows, what "
        f"to_dict() says, or a JSON file with that; got {quoted(given)} of type "
        f"{shown(type(given).__name__)}"
    )


def saved_of(given: MethodLike, **fields: Any) -> Saved:
    """The methods that are meant, with what a foveate.json says besides them.

    Args:
        given: see `methods_of`. Only a file that is no entry of a list can say more than methods.
        **fields: hyper-parameters, which go with a name or a class.

    Raises:
        FoveateError: see `methods_of`.
    """
    if _is_file(given):
        return _read(Path(cast(Any, given)), fields)
    return Saved(methods_of(given, **fields))


def _is_file(given: MethodLike) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".json"))


def _make(kind: type[Method], fields: Mapping[str, Any]) -> Method:
    """A method of a class, with fields."""
    try:
        return kind(**fields)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(cast(Any, kind)))
        name = getattr(kind, "slug", kind.__name__)
        raise FoveateError(f"{name} takes the fields {known}; {shown(error, 100)}") from None


def _read(path: Path, fields: Mapping[str, Any]) -> Saved:
    """What a file holds: one method, or a foveate.json."""
    if fields:
        raise FoveateError(
            f"fields go with a method's name; got {shown(', '.join(fields))} beside {shown(path)}"
        )
    try:
        data = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read as a method: {reason(error)}") from None
    try:
        if isinstance(data, dict) and "format" in data:
            return Saved.from_dict(data)
        if not isinstance(data, Mapping):
            raise InputError(f"a method is a mapping with its name, got {quoted(data)}")
        return Saved((from_dict(data),))
    except FoveateError as error:
        raise type(error)(within(path, error)) from None
