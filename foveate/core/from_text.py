"""From text to a method: names, `keep`, `field=value`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from foveate.core.budget import Keep
from foveate.core.fields import hints_of, spell
from foveate.core.method import Method
from foveate.core.resolve import methods_of, saved_of
from foveate.core.saving import Saved
from foveate.core.step import STAGES
from foveate.errors import BudgetError, InputError
from foveate.io.quoting import quoted, shown


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
            f"got {quoted(text)}"
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
    found = methods_of(name)
    if len(found) > 1:
        raise InputError(f"{shown(name)} holds {len(found)} methods, where one is wanted")
    return _changed(found[0], keep, settings)


def make_methods(
    names: Sequence[str], keeps: Sequence[str] = (), settings: Iterable[str] = ()
) -> tuple[Method, ...]:
    """Build methods from command-line text, in the order in which they act.

    Args:
        names: what `make_method` takes, files of several methods, or names joined by `+`, as
            reports write them; stages need not be in order.
        keeps: none, or one for each method in the order of `names`.
        settings: `field=value` for a single method, `method.field=value` for one of several.

    Raises:
        FoveateError: a name, a field or a value is not known, or it is not clear whose it is; or a
            file says more than methods.
    """
    return make_saved(names, keeps, settings).alone(names[0])


def make_saved(
    names: Sequence[str], keeps: Sequence[str] = (), settings: Iterable[str] = ()
) -> Saved:
    """As `make_methods`, with what a foveate.json that is the only name says besides methods."""
    parts = [part for name in names for part in _parts(name)]
    if len(parts) == 1:
        saved = saved_of(parts[0])
    else:
        saved = Saved(tuple(method for part in parts for method in methods_of(part)))
    found = saved.methods
    slugs = [method.slug for method in found]
    if len(keeps) not in (0, len(found)):
        raise InputError(
            f"{len(found)} methods, but {len(keeps)} --keep: give one for each in the order of "
            f"--method, or --set {shown(slugs[0])}.keep=VALUE"
        )
    of: list[list[str]] = [[] for _ in found]
    for setting in settings:
        slug, dot, _ = setting.partition("=")[0].partition(".")
        if dot and slugs.count(slug) == 1:
            of[slugs.index(slug)].append(setting[len(slug) + 1 :])
        elif len(found) == 1 and not dot:
            of[0].append(setting)
        else:
            raise InputError(
                f"--set takes method.field=value with one of {shown(', '.join(slugs), 90)}, each "
                f"named once, got {quoted(setting)}"
            )
    made = [_changed(method, keeps[n] if keeps else None, of[n]) for n, method in enumerate(found)]
    made.sort(key=lambda method: STAGES.index(method.stage))
    return dataclasses.replace(saved, methods=tuple(made))


def _parts(name: str) -> list[str]:
    """The names of a composition, `divprune+fastv` or `divprune + fastv`; a file is one."""
    return [name] if name.endswith(".json") else [part.strip() for part in name.split("+")]


def _changed(method: Method, keep: str | None, settings: Iterable[str]) -> Method:
    """A method with another budget and other fields."""
    fields: dict[str, Any] = {} if keep is None else {"keep": parse_keep(keep)}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes field=value, got {quoted(setting)}")
        fields[field.strip()] = read_field(type(method), field.strip(), text.strip())
    return dataclasses.replace(method, **fields)  # type: ignore[type-var]


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
    hints = hints_of(cls)
    known = [field.name for field in _fields(cls)]
    if name not in known:
        raise InputError(f"{cls.slug} has no field {quoted(name)}; its fields: {signature(cls)}")
    hint = hints.get(name, str)
    if name == "keep":
        optional = type(None) in (hint, *typing.get_args(hint))
        return None if optional and text.lower() == "none" else parse_keep(text)
    try:
        return _coerce(text, hint)
    except ValueError:
        raise InputError(
            f"{cls.slug} cannot read {name}={shown(text)}: expected {spell(hint)}; "
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
    if origin is typing.Annotated:
        return _coerce(text, typing.get_args(hint)[0])
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

    def width(hint: Any) -> int:
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        return narrow_first.index(bare) if bare in narrow_first else 4 + (bare is str)

    for hint in sorted(hints, key=width):
        try:
            return _coerce(text, hint)
        except ValueError:
            continue
    raise ValueError(text)
