"""The results file: one Parquet row for each finished cell, and a journal that survives a kill.

A finished cell is first a line of `NAME.journal`, flushed to disk; journals are folded into the
Parquet file when a run ends, and when the next one begins. The Parquet file is only ever replaced
as a whole, so that it is readable at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, InputError
from foveate.io.locking import locked
from foveate.io.writing import append_line, replacing

Row = dict[str, Any]


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FoveateError(
            "the benchmark stores results as Parquet: pip install 'foveate[bench]'"
        ) from None
    return pyarrow, pyarrow.parquet


def _schema(pa: Any) -> Any:
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    answer = pa.struct([
        ("seed", whole), ("turn", whole), ("question", text), ("answer", text), ("said", text),
        ("right", pa.bool_()), ("recall", number), ("hit", number), ("agrees", pa.bool_()),
        ("kl", number),
    ])  # fmt: skip
    survival = pa.struct([
        ("height", whole), ("width", whole), ("images", whole),
        ("lifetimes", pa.list_(pa.float32())),
    ])  # fmt: skip
    site = pa.struct([("site", text), ("recall", number)])
    texts = ("key", "model", "fingerprint", "method", "settings", "task", "split", "status",
             "error", "command", "versions", "machine", "finished")  # fmt: skip
    numbers = ("keep", "accuracy", "majority", "agreement", "kl", "recall", "hit", "visual_tokens",
               "tokens_ratio", "flops_before", "flops_after", "kv_bytes_before", "kv_bytes_after",
               "seconds", "ttft_ms", "ttft_all_ms")  # fmt: skip
    return pa.schema([
        *((name, text) for name in texts), *((name, number) for name in numbers),
        ("n", whole), ("right", whole), ("samples", whole), ("seed", whole),
        ("recall_by_site", pa.list_(site)), ("survival", survival),
        ("notes", pa.list_(text)), ("answers", pa.list_(answer)),
    ])  # fmt: skip


class Store:
    """Finished cells, by key; the last one under a key counts.

    Args:
        path: the Parquet file; it need not exist.

    Raises:
        InputError: the file or its journal cannot be read.
        FoveateError: pyarrow is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.journal = self.path.with_suffix(".journal")
        _arrow()
        self._rows: dict[str, Row] = {row["key"]: row for row in self._read()}
        self._rows.update({row["key"]: row for row in self._replay()})

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """All finished cells, in the order in which they were finished."""
        return list(self._rows.values())

    def get(self, keys: Iterable[str]) -> list[Row]:
        """The finished ones of some cells, in the order of the keys."""
        return [self._rows[key] for key in keys if key in self._rows]

    def add(self, row: Mapping[str, Any]) -> None:
        """Remember a finished cell; it is on the disk when this returns.

        Raises:
            InputError: the disk is full; cells that were finished before are kept.
        """
        append_line(self.journal, row)
        self._rows[row["key"]] = dict(row)

    def fold(self) -> None:
        """Put what the journal holds into the Parquet file."""
        if not self.journal.exists():
            return
        pa, parquet = _arrow()
        table = pa.Table.from_pylist(self.rows, schema=_schema(pa))
        with replacing(self.path) as part:
            parquet.write_table(table, part, compression="zstd", row_group_size=64)
        self.journal.unlink()

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Keep other runs out, and fold at the end, whatever happens.

        Raises:
            InputError: another run writes to the file, or none can.
        """
        lock = self.path.with_suffix(".lock")
        message = (
            f"another run writes to {self.path}; wait for it, or choose another folder with --out"
        )
        with locked(lock, message):
            try:
                yield self
            finally:
                self.fold()

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        _, parquet = _arrow()
        try:
            rows: list[Row] = parquet.read_table(self.path).to_pylist()
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot read {self.path} as results of `foveate bench` ({reason}); move it away, "
                "or choose another folder with --out"
            ) from error
        if rows and "key" not in rows[0]:
            raise InputError(
                f"{self.path} is a Parquet file, but not of `foveate bench`; choose another folder "
                "with --out"
            )
        return rows

    def _replay(self) -> list[Row]:
        """Rows of the journal; a last line that was cut off when a run was killed does not count.

        Raises:
            InputError: another line is broken.
        """
        if not self.journal.exists():
            return []
        data = self.journal.read_bytes()
        lines = data.split(b"\n")
        rows = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise InputError(
                    f"line {number} of {self.journal} is broken; delete that line, and its cell "
                    "is run again"
                ) from None
        if lines[-1]:
            os.truncate(self.journal, len(data) - len(lines[-1]))
        return rows
