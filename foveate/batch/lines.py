"""jsonl: what its columns hold, where its shards begin, and its rows as a table.

Files are scanned once before the work, so that all shards of a run get the same types. Columns
whose values are of several kinds, or mappings, or lists of anything but text, become JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.batch.arrow import arrow
from foveate.io.reading import parse_json, reason

BOM = b"\xef\xbb\xbf"
_EXACT = 2**53  # whole numbers that a float holds exactly
_WHOLE = 2**63


@dataclass
class Scan:
    """What a pass over a file finds.

    Args:
        rows: lines that are not blank.
        starts: byte at which each shard begins.
        kinds: column -> kinds of its values, see `kind_of`.
    """

    rows: int = 0
    starts: list[int] = field(default_factory=list)
    kinds: dict[str, set[str]] = field(default_factory=dict)


def scan(path: Path, shard_rows: int | None) -> Scan:
    """Look at all lines of a file.

    Args:
        path: the file.
        shard_rows: rows of a shard; `None` for one shard.

    Raises:
        OSError: it cannot be read.
        ValueError: its first line is no JSON object.
    """
    found, at = Scan(), 0
    with path.open("rb") as file:
        for line in file:
            if line.removeprefix(BOM).strip():
                if not found.starts or (shard_rows and found.rows % shard_rows == 0):
                    found.starts.append(at)
                row, fault = parse(line)
                if fault is not None and not found.rows:
                    raise ValueError(f"its first line is {fault}")
                found.rows += 1
                for name, value in row.items():
                    found.kinds.setdefault(name, set()).add(kind_of(value))
            at += len(line)
    return found


def parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    """A line as a row; an empty row and what is wrong where it is none."""
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError among them
        return {}, f"no JSON ({reason(error)})"
    if not isinstance(row, dict):
        return {}, "no JSON object"
    return row, None


def read(path: Path, start: int, rows: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Rows of a shard, as `parse` gives them.

    Args:
        path: the file.
        start: byte at which the shard begins.
        rows: of the shard.
    """
    with path.open("rb") as file:
        file.seek(start)
        left = rows
        for line in file:
            if not left:
                return
            if line.removeprefix(BOM).strip():
                left -= 1
                yield parse(line)


def kind_of(value: Any) -> str:
    """`null`, `bool`, `int`, `long`, `float`, `text`, `texts` or `other`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        fits = -_WHOLE <= value < _WHOLE
        return "int" if abs(value) <= _EXACT else ("long" if fits else "other")
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return "texts"
    return "other"


def column_types(scans: Sequence[Scan]) -> dict[str, str]:
    """Column -> the kind that all its values are stored as, over all files."""
    kinds: dict[str, set[str]] = {}
    for found in scans:
        for name, some in found.kinds.items():
            kinds.setdefault(name, set()).update(some)
    return {name: _joined(some - {"null"}) for name, some in kinds.items()}


def _joined(kinds: set[str]) -> str:
    if not kinds:
        return "text"
    if kinds == {"int", "float"}:
        return "float"
    if kinds <= {"int", "long"}:
        return "int"
    return kinds.pop() if len(kinds) == 1 else "other"


def to_table(rows: Sequence[Mapping[str, Any]], types: Mapping[str, str]) -> Any:
    """Rows as a pyarrow table with a column for each of `types`; what a row lacks is null."""
    pa, _ = arrow()
    kinds = {
        "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(),
        "texts": pa.list_(pa.string()), "other": pa.string(),
    }  # fmt: skip
    columns = {}
    for name, kind in types.items():
        values = [row.get(name) for row in rows]
        if kind == "other":
            values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
        columns[name] = pa.array(values, kinds[kind])
    return pa.table(columns)
