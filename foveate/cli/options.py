"""From command-line text to a method: `--keep`, `--set field=value`."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.budget import Keep
from foveate.errors import BudgetError, InputError
from foveate.method import Method, get_method
from foveate.saving import from_dict


def parse_keep(text: str) -> Keep:
    """Read a `keep`: `0.25` is a share, `64` a count per image, `0.5,0.25,0.125` a schedule.

    Raises:
        BudgetError: an entry is not a number.
    """
    parts = text.strip("() ").rstrip(", ").split(",")
    shares = tuple(_share(part.strip()) for part in parts)
    return shares if "," in text else shares[0]


def _share(text: str) -> float | int:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise BudgetError(
            f"keep must be a share like 0.25, a count like 64 or a schedule like 0.5,0.25, "
            f"got {text!r}"
        ) from None


def make_method(name: str, keep: str | None = None, settings: Iterable[str] = ()) -> Method:
    """Build a method from command-line text.

    Args:
        name: its registry name, or a `.json` file that holds what `Method.to_dict` says.
        keep: what `parse_keep` reads; `None` leaves the method's default.
        settings: `field=value` pairs, read by the type of the field.

    Raises:
        FoveateError: the name, a field or a value is not known; the message lists what is.
    """
    saved = _read_method(Path(name)) if name.endswith(".json") else None
    cls = get_method(name) if saved is None else type(saved)
    fields: dict[str, Any] = {} if keep is None else {"keep": parse_keep(keep)}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes field=value, got {setting!r}")
        fields[field.strip()] = read_field(cls, field.strip(), text.strip())
    return cls(**fields) if saved is None else dataclasses.replace(saved, **fields)  # type: ignore[type-var]


def _read_method(path: Path) -> Method:
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a method: {error}") from None


def signature(cls: type[Method]) -> str:
    """Fields of a method with their defaults: `layer=2, keep=0.5`."""
    return ", ".join(f"{field.name}={_default(field)}" for field in _fields(cls))


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _default(field: dataclasses.Field[Any]) -> str:
    return "..." if field.default is dataclasses.MISSING else repr(field.default)


def read_field(cls: type[Method], name: str, text: str) -> Any:
    """Read text as the value of a method's field, by the field's type.

    Raises:
        InputError: there is no such field, or the text does not fit; the message lists the fields.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in _fields(cls)]
    if name not in known:
        raise InputError(f"{cls.slug} has no field {name!r}; its fields: {signature(cls)}")
    if name == "keep":
        optional = type(None) in (hints[name], *typing.get_args(hints[name]))
        return None if optional and text.lower() == "none" else parse_keep(text)
    try:
        return _coerce(text, hints[name])
    except ValueError:
        raise InputError(
            f"{cls.slug} cannot read {name}={text}: expected {_spell(hints[name])}; "
            f"its fields: {signature(cls)}"
        ) from None


def _coerce(text: str, hint: Any) -> Any:
    """Read text as a value of a type.

    Raises:
        ValueError: it is no such value.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(text, typing.get_args(hint))
    if origin is typing.Literal:
        for choice in typing.get_args(hint):
            if str(choice) == text:
                return choice
    elif origin is tuple:
        item = typing.get_args(hint)[0]
        parts = text.strip("() ").rstrip(",").split(",")
        return tuple(_coerce(part.strip(), item) for part in parts)
    elif hint is type(None):
        if text.lower() == "none":
            return None
    elif hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif hint in (int, float, str):
        return hint(text)
    raise ValueError(text)


def _coerce_union(text: str, hints: tuple[Any, ...]) -> Any:
    """The first member that fits; narrow types go first, so that `2` is an int and not text."""
    narrow_first = (type(None), bool, int, float)
    order = sorted(
        hints,
        key=lambda h: (
            narrow_first.index(h) if h in narrow_first else len(narrow_first) + (h is str)
        ),
    )
    for hint in order:
        try:
            return _coerce(text, hint)
        except ValueError:
            continue
    raise ValueError(text)


def _spell(hint: Any) -> str:
    """A type as a user would write it: `int`, `none or a list of int like 2,4`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if origin is tuple:
        return f"a list of {_spell(typing.get_args(hint)[0])} like 2,4"
    if hint is type(None):
        return "none"
    return "true or false" if hint is bool else getattr(hint, "__name__", str(hint))
