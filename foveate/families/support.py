"""Which method works on which family: what the conformance suite found, and how to show it.

`support.json` is written by the suite, which runs every method on every family and fails if the
file says something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypeAlias

YES = "yes"
Entry: TypeAlias = str | Mapping[str, str]
"""`yes`, why not, or one of those for each variant of a family where they differ."""
Entries: TypeAlias = Mapping[str, Mapping[str, Entry]]


def support() -> Entries:
    """Method -> model type -> entry, for all built-in methods and families."""
    path = resources.files("foveate.families") / "support.json"
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Matrix:
    """Entries as marks, with numbered notes.

    Args:
        columns: methods, those with equal entries together.
        rows: for each model type, whether each column works, and the number of its note or 0.
        notes: what the numbers stand for, from 1.
    """

    columns: list[tuple[str, ...]]
    rows: dict[str, list[tuple[bool, int]]]
    notes: list[str]

    @classmethod
    def of(cls, entries: Entries, methods: Sequence[str], *, together: bool = False) -> Matrix:
        """The matrix of some methods, in their order.

        Args:
            entries: as `support` returns them.
            methods: the methods to show; those without entries are left out.
            together: whether methods with equal entries share a column.
        """
        columns: list[tuple[str, ...]] = []
        for name in (name for name in methods if name in entries):
            same = [c for c in columns if together and entries[c[0]] == entries[name]]
            if same:
                columns[columns.index(same[0])] += (name,)
            else:
                columns.append((name,))
        notes: list[str] = []
        rows: dict[str, list[tuple[bool, int]]] = {}
        for model_type in sorted({family for of in entries.values() for family in of}):
            rows[model_type] = []
            for column in columns:
                entry = entries[column[0]][model_type]
                why = _note(entry)
                if why and why not in notes:
                    notes.append(why)
                number = notes.index(why) + 1 if why else 0
                rows[model_type].append((_works(entry), number))
        return cls(columns, rows, notes)


def _works(entry: Entry) -> bool:
    return YES in ([entry] if isinstance(entry, str) else entry.values())


def _note(entry: Entry) -> str:
    """What is to be said of an entry; nothing if the method simply works."""
    if isinstance(entry, str):
        return "" if entry == YES else entry
    variants: dict[str, list[str]] = {}
    for variant, why in entry.items():
        variants.setdefault(why, []).append(variant)
    refused = [
        f"not with {' or '.join(of)}, where it {why}" for why, of in variants.items() if why != YES
    ]
    return "; ".join(refused)


def reasons(entries: Entries) -> dict[str, tuple[list[str], list[str]]]:
    """Refusals by what they begin with -> (methods, families), the widest first.

    What follows a first comma or colon says what it is about a model; it is left out.
    """
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for method, of in entries.items():
        for family, entry in of.items():
            for why in (entry,) if isinstance(entry, str) else entry.values():
                if why != YES:
                    methods, families = found.setdefault(re.split("[,:] ", why)[0], ({}, {}))
                    methods[method] = families[family] = None
    order = sorted(found.items(), key=lambda item: -len(item[1][1]))
    return {why: (list(methods), list(families)) for why, (methods, families) in order}
