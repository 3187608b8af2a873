"""Fields of dataclasses, checked against their annotations.

What is checked: `int`, `float`, `bool`, `str`, `Path`, `None`, `Literal`, unions, tuples, and
ranges of numbers as in `Annotated[int, Range(1)]`. Other annotations are their author's concern.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

from foveate.errors import FoveateError, LayerError
from foveate.io.quoting import quoted

LARGEST = 2**63 - 1
"""The largest whole number of a field."""


@dataclass(frozen=True)
class Range:
    """Where a number lies.

    Args:
        low: the least.
        high: the largest; `None` for any.
        above: `low` itself is left out.
        below: `high` itself is left out.
    """

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a number lies within."""
        if value < self.low or (self.above and value == self.low):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        """In words: `at least 1`, `in [0, 1)`."""
        if self.high is None:
            return f"above {self.low}" if self.above else f"at least {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"


Positive = Annotated[int, Range(1)]
"""A number of things, of which there is one at least."""

Natural = Annotated[int, Range(0)]
"""A number of things, or the number of a layer."""

UnitFloat = Annotated[float, Range(0, 1)]
"""A share that may be nothing and everything."""


class MisfitError(ValueError):
    """A value does not fit an annotation; the message, if any, is the range it should lie in."""


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Field -> annotation of a class; those that cannot be evaluated here are left out."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception:  # an annotation may name what only its author's function knows
        hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        known = vars(sys.modules.get(base.__module__, types.ModuleType("")))
        for name, hint in vars(base).get("__annotations__", {}).items():
            alone = types.SimpleNamespace(__annotations__={name: hint})
            try:
                hints |= typing.get_type_hints(alone, dict(known), include_extras=True)
            except Exception:
                hints.pop(name, None)
    return hints


def check_fields(
    owner: Any,
    where: str,
    chosen: Callable[[str], bool] = lambda field: True,
    error_of: Callable[[str], type[FoveateError]] = lambda field: FoveateError,
) -> None:
    """Check the fields of a dataclass, and put plain values in their place.

    Numbers of numpy become Python's, lists become tuples, and whole numbers become floats where
    floats are wanted. A field's own default is never refused.

    Args:
        owner: the instance.
        where: what it is called in a message.
        chosen: which fields to check.
        error_of: what to raise for a field.

    Raises:
        FoveateError: a value does not fit; the message says which one and what would.
    """
    kind: type = type(owner)
    hints = hints_of(kind)
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if not chosen(field.name) or field.name not in hints or value is field.default:
            continue
        try:
            plain = fit(value, hints[field.name])
        except MisfitError as why:
            error = error_of(field.name)
            wanted = str(why) or spell(hints[field.name])
            raise error(f"{field.name} must be {wanted}, got {quoted(value)} in {where}") from None
        if plain is not value:
            object.__setattr__(owner, field.name, plain)


def check_ascending(layers: Sequence[int] | None, field: str = "layers") -> None:
    """Check layers that ascend; `None` passes.

    Raises:
        LayerError: there are none, or they do not ascend.
    """
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        raise LayerError(f"{field} must be ascending and distinct, got {quoted(layers)}")


def fit(value: Any, hint: Any) -> Any:
    """A value as an annotation wants it.

    Args:
        value: what was given, from Python, JSON or YAML.
        hint: the annotation.

    Raises:
        MisfitError: it does not fit.
    """
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, members)
    if origin is Literal:
        return _demand(value, any(type(value) is type(m) and value == m for m in members))
    if origin is Annotated:
        plain = fit(value, members[0])
        for extra in members[1:]:
            if isinstance(extra, Range) and plain not in extra:
                raise MisfitError(str(extra))
        return plain
    if origin is tuple:
        return _fit_tuple(value, members)
    if hint in (None, types.NoneType):
        return _demand(value, value is None)
    if hint is bool:
        return _demand(value, isinstance(value, bool))
    if hint in (int, float):
        return _fit_number(value, hint)
    if hint is str:
        return _demand(value, isinstance(value, str))
    if hint is Path:
        return Path(_demand(value, isinstance(value, str | Path)))
    return value


def _demand(value: Any, fits: bool) -> Any:
    if not fits:
        raise MisfitError
    return value


def _fit_union(value: Any, members: tuple[Any, ...]) -> Any:
    """As the first member that the value fits, those of its own type before others."""
    reasons = []
    for hint in sorted(members, key=lambda hint: _bare(hint) is not type(value)):
        try:
            return fit(value, hint)
        except MisfitError as why:
            reasons.append(str(why))
    raise MisfitError(next(filter(None, reasons), ""))


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _fit_tuple(value: Any, members: tuple[Any, ...]) -> Any:
    _demand(value, isinstance(value, list | tuple))
    if members[1:] == (...,):
        members = (members[0],) * len(value)
    _demand(value, len(value) == len(members))
    try:
        plain = tuple(fit(entry, hint) for entry, hint in zip(value, members, strict=True))
    except MisfitError:
        raise MisfitError from None
    same = type(value) is tuple and all(a is b for a, b in zip(value, plain, strict=True))
    return value if same else plain


def _fit_number(value: Any, hint: type) -> Any:
    _demand(value, isinstance(value, Integral if hint is int else Real))
    _demand(value, not isinstance(value, bool))
    _demand(value, isinstance(value, float) or -LARGEST <= value <= LARGEST)
    plain = hint(value)
    _demand(value, math.isfinite(plain))
    return value if type(value) is hint else plain


def spell(hint: Any) -> str:
    """An annotation in words: `an int at least 1 or None`."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        last = [m for m in members if m in (None, types.NoneType)]
        return " or ".join(spell(m) for m in [*(m for m in members if m not in last), *last])
    if origin is Literal:
        return " or ".join(map(repr, members))
    if origin is Annotated:
        ranges = [str(extra) for extra in members[1:] if isinstance(extra, Range)]
        return " ".join([spell(members[0]), *ranges])
    if origin is tuple:
        if members[1:] == (...,):
            return f"a list, each entry {spell(members[0])}"
        return f"a list of {len(members)}, each entry {spell(members[0])}"
    if hint in (None, types.NoneType):
        return "None"
    known: dict[Any, str] = {
        int: "an int",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
        Path: "a path",
    }
    return known.get(hint) or str(getattr(hint, "__name__", hint))
