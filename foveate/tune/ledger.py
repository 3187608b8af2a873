"""The ledger: a file of everything that was asked, from which a killed search goes on.

A search is a function of its settings and of what the model said. So going on is beginning anew
with the ledger at hand: what it holds is not asked again, and the rest comes as it would have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.core import Method
from foveate.errors import InputError
from foveate.io.quoting import shown
from foveate.io.writing import append_line

Entry = dict[str, Any]


def recipe_key(methods: Sequence[Method]) -> str:
    """A short name of a recipe, by all of its fields."""
    text = json.dumps([method.to_dict() for method in methods], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """Results by key, on disk as soon as they are known.

    Args:
        path: a JSON object a line; made if need be. `None` keeps all in memory.
        settings: what must be the same for a search to go on.

    Raises:
        InputError: the file is of a search with other settings, or is no ledger.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._known: dict[str, Entry] = {}
        settings = json.loads(json.dumps(settings))
        lines = [] if path is None or not path.exists() else self._lines(path)
        if not lines:
            self._write({"settings": settings})
            return
        self._check(lines[0].get("settings"), settings)
        self._known = {line["key"]: line["value"] for line in lines[1:]}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str, make: Callable[[], Entry]) -> Entry:
        """The value of a key, which is made where it is not known."""
        if key not in self._known:
            value = make()
            self._write({"key": key, "value": value})
            self._known[key] = json.loads(json.dumps(value))
        return self._known[key]

    def _write(self, line: Entry) -> None:
        if self.path is not None:
            append_line(self.path, line)

    def _lines(self, path: Path) -> list[Entry]:
        """Whole lines; one on which a search was killed is cut off."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            fits = all("settings" in line for line in lines[:1])
            fits = fits and all({"key", "value"} <= line.keys() for line in lines[1:])
        except (ValueError, AttributeError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{shown(path, 120)} is not a record of a search; name another --out")
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        return lines

    def _check(self, known: Any, wanted: Mapping[str, Any]) -> None:
        if known == wanted:
            return
        names = sorted({*known, *wanted})
        differs = [name for name in names if known.get(name) != wanted.get(name)]
        raise InputError(
            f"{shown(self.path or '', 120)} is of a search with other settings "
            f"({', '.join(differs)}); name another --out, or delete it"
        )
