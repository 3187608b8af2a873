"""Text that users hand over: read whole, in bounded time and memory, or refused with a reason.

Everything here raises `OSError` or `ValueError`; what `reason` makes of them belongs in an
`InputError` that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.io.quoting import quoted, shown

DEEPEST = 64
"""Lists and mappings within each other."""


def read_text(path: str | Path, largest: int | None = None) -> str:
    """A file as text; line ends stay as they are, a byte order mark does not.

    Args:
        path: the file.
        largest: bytes above which it is refused; `None` for any.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, is too large, or its name holds a NUL.
    """
    with Path(path).open("rb") as file:
        data = file.read() if largest is None else file.read(largest + 1)
    if largest is not None and len(data) > largest:
        raise ValueError(f"it is larger than {largest // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Lines of a file that are not blank, with their numbers from 1; only newlines end a line.

    Raises:
        OSError: as `read_text`.
        ValueError: as `read_text`.
    """
    text = read_text(path)
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def parse_json(text: str) -> Any:
    """JSON as plain values.

    Raises:
        ValueError: it is none, or names a key twice, nests without end, or holds numbers or text
            that nothing can be done with.
    """
    try:
        value = json.loads(text, object_pairs_hook=_mapping, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"it nests more than {DEEPEST} deep") from None
    check_plain(value)
    return value


def check_plain(value: Any) -> None:
    """Refuse values that nest too deep, and text that no file could hold.

    Args:
        value: lists, mappings and what is in them.

    Raises:
        ValueError: so it is.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        entries: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                entries += item
                entries += item.values()
            elif isinstance(item, list | tuple):
                entries += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
        if not entries:
            return
        level = entries
    raise ValueError(f"it nests more than {DEEPEST} deep")


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    told = error.strerror if isinstance(error, OSError) else None
    return shown(told or error, 120)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {quoted(name)} stands twice")
            seen.add(name)
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{quoted(text)} holds half of a character") from None
