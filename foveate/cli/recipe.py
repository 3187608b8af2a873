"""A YAML file as a recipe: every key is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from foveate.cli.bounded_yaml import LARGEST, parse_yaml
from foveate.cli.elsewhere import why_absent
from foveate.core import Method, get_method
from foveate.core.fields import MisfitError, Natural, Positive, fit, hints_of, spell
from foveate.core.from_text import read_field, signature
from foveate.core.saving import from_dict
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import near, quoted, shown, within
from foveate.io.reading import read_text, reason
from foveate.training.finetune.recipe import DTYPES, TRAINED, Data, Recipe

if TYPE_CHECKING:
    from foveate.training.prepare import Train


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file as `foveate train --example` shows; paths are relative to its folder.

    Raises:
        FoveateError: it cannot be read, or a key or a value is wrong; the message names the key
            and what it could be.
    """
    try:
        text = read_text(path, LARGEST)
    except FileNotFoundError:
        raise InputError(
            f"no such recipe: {shown(path)}; `foveate train --example > {shown(path)}` writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {shown(path)}: {reason(error)}") from None
    try:
        loaded = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{shown(path)} is not YAML: {shown(error, 200)}") from None
    try:
        return parse_recipe(loaded, path.parent)
    except FoveateError as error:
        raise type(error)(within(path, error)) from None


def parse_recipe(loaded: Any, folder: Path = Path()) -> Recipe:
    """Check a loaded YAML document.

    Args:
        loaded: what YAML made of it.
        folder: what its paths are relative to.

    Raises:
        FoveateError: as in `read_recipe`.
    """
    fields = _section(loaded, "the recipe", [field.name for field in dataclasses.fields(Recipe)])
    for name in ("model", "out", "data"):
        if name not in fields:
            raise InputError(f"{name!r} is missing; `foveate train --example` shows a full recipe")
    model = _text(fields["model"], "model")
    return Recipe(
        model=str(folder / model) if os.path.isdir(folder / model) else model,
        out=folder / _text(fields["out"], "out"),
        data=_data(fields["data"], folder),
        method=_methods(fields.get("method")),
        train=cast("Train", _choice(fields.get("train", "all"), "train", TRAINED)),
        freeze=_names(fields.get("freeze"), "freeze"),
        lora=_lora(fields.get("lora")),
        dtype=_choice(fields.get("dtype", "auto"), "dtype", DTYPES),
        trainer=_trainer(fields.get("trainer")),
    )


def _section(value: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
    """A mapping with known keys only; nothing is an empty one."""
    known = list(known)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a mapping of keys to values, got {quoted(value)}")
    for name in value:
        if name not in known:
            if why := why_absent("train", str(name)):
                raise InputError(f"{where} cannot set {name}: {why}")
            raise InputError(f"unknown key {quoted(name)} in {where}; {near(name, known)}")
    return dict(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} must be a string, got {quoted(value)}")
    if "\0" in value or len(value) > 1000:
        raise InputError(f"{name} must be a valid file name, got {quoted(value)}")
    return value


def _choice(value: Any, name: str, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {quoted(value)}")
    return value


def _count(value: Any, name: str) -> int:
    try:
        return int(fit(value, Positive))
    except MisfitError:
        raise InputError(f"{name} must be a positive whole number, got {quoted(value)}") from None


def _names(value: Any, name: str) -> tuple[str, ...]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise InputError(
            f"{name} must be a list of substrings of parameter names, got {quoted(value)}"
        )
    return tuple(values)


def _data(value: Any, folder: Path) -> Data:
    given = _section(value, "data", ("file", "scenes", "turns", "seed", "max_pixels"))
    if ("file" in given) == ("scenes" in given):
        raise InputError(
            "data needs either `file`, a jsonl file, or `scenes`, the number of scenes to draw"
        )
    if "file" in given:
        extra = sorted(given.keys() - {"file", "max_pixels"})
        if extra:
            raise InputError(f"data.{extra[0]} goes with `scenes`, not with `file`")
        most = given.get("max_pixels")
        return Data(
            file=folder / _text(given["file"], "data.file"),
            max_pixels=None if most is None else _count(most, "data.max_pixels"),
        )
    if "max_pixels" in given:
        raise InputError("data.max_pixels goes with `file`, not with `scenes`")
    try:
        seed = fit(given.get("seed", 0), Natural)
    except MisfitError:
        got = quoted(given["seed"])
        raise InputError(f"data.seed must be a whole number from 0, got {got}") from None
    return Data(
        scenes=_count(given["scenes"], "data.scenes"),
        turns=_count(given.get("turns", 4), "data.turns"),
        seed=seed,
    )


def _methods(value: Any) -> Method | tuple[Method, ...] | None:
    """A method by name, or by name and fields; or a list of those."""
    if value is None:
        return None
    if not isinstance(value, list):
        return _method(value)
    if not value:
        raise InputError("method must name at least one method; omit it to train with all tokens")
    return tuple(_method(entry) for entry in value)


def _method(value: Any) -> Method:
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise InputError(
            f"method must be a name, or a mapping with the key `name`, got {quoted(value)}"
        )
    cls = get_method(given["name"])
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    fields: dict[str, Any] = {}
    for name, entry in given.items():
        if name == "name":
            continue
        if name not in known:
            if why := why_absent("train", str(name)):
                raise InputError(f"method cannot set {name}: {why}")
            raise InputError(
                f"unknown key {quoted(name, 30)} in method; {near(name, known)} ({cls.slug}: "
                f"{shown(signature(cls), 120)})"
            )
        # As text where YAML takes it for that, such as `0.5,0.25` and `1e-1`.
        fields[name] = read_field(cls, name, entry) if isinstance(entry, str) else entry
    return from_dict({"method": cls.slug, **fields})


def _lora(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError("a recipe with `lora` needs peft: `pip install peft`") from None
    given = _section(value, "lora", [field.name for field in dataclasses.fields(LoraConfig)])
    _check_types(given, LoraConfig, "lora")
    try:
        LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {shown(error, 200)}") from None
    return given


def _check_types(given: Mapping[str, Any], kind: type, where: str, **others: Any) -> None:
    """Check values by the annotations of what takes them, or by `others` where those are wrong."""
    hints = {**hints_of(kind), **others}
    for name, value in given.items():
        try:
            fit(value, hints.get(name, Any))
        except MisfitError as why:
            wanted = str(why) or shown(spell(hints[name]), 120)
            hint = "; in YAML, write 1.0e-4 with a decimal point" if isinstance(value, str) else ""
            raise InputError(
                f"{where}.{name} must be {wanted}, got {quoted(value)}{hint}"
            ) from None


def _trainer(value: Any) -> dict[str, Any]:
    from transformers import TrainingArguments

    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    given = _section(value, "trainer", known)
    for name, instead in (
        ("output_dir", "use the key `out` instead"),
        ("resume_from_checkpoint", "a run resumes from its last checkpoint automatically"),
        ("remove_unused_columns", "it must stay off, or the collator receives no data"),
    ):
        if name in given:
            raise InputError(f"trainer.{name} cannot be set: {instead}")
    _check_types(given, TrainingArguments, "trainer", fsdp=bool | str | None)
    return given
