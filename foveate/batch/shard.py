"""Rows of a shard: what is asked, and the columns that are carried through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.batch import lines
from foveate.batch.arrow import arrow
from foveate.batch.plan import Plan, Shard
from foveate.errors import InputError
from foveate.io.quoting import shown
from foveate.io.reading import reason


@dataclass(frozen=True)
class Rows:
    """Rows of a shard.

    Args:
        table: all columns.
        images: what the column of images holds in a row.
        question: the question of a row.
        faults: what is wrong with each row, or `None`.
    """

    table: Any
    images: Callable[[int], Any]
    question: Callable[[int], Any]
    faults: Sequence[str | None]


def read(shard: Shard, plan: Plan, question: str) -> Rows:
    """Read a shard.

    Raises:
        InputError: its file cannot be read.
    """
    try:
        if shard.path.suffix.lower() == ".jsonl":
            return _from_lines(shard, plan, question)
        return _from_parquet(shard, plan, question)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {shown(shard.path, 100)}: {reason(error)}") from None


def _from_lines(shard: Shard, plan: Plan, question: str) -> Rows:
    pairs = list(lines.read(shard.path, shard.start, shard.rows))
    rows = [row for row, _ in pairs]
    faults = [None if fault is None else f"the line is {fault}" for _, fault in pairs]
    return Rows(
        lines.to_table(rows, plan.types),
        lambda n: rows[n].get(plan.images),
        lambda n: rows[n].get(question),
        faults,
    )


def _from_parquet(shard: Shard, plan: Plan, question: str) -> Rows:
    table = _slice(shard)
    images, questions = table[plan.images], table[question]
    return Rows(
        table, lambda n: images[n].as_py(), lambda n: questions[n].as_py(), [None] * shard.rows
    )


def _slice(shard: Shard) -> Any:
    """The rows of a shard, from those row groups that hold them."""
    _, parquet = arrow()
    with parquet.ParquetFile(shard.path) as file:
        begin, groups, skipped = 0, [], 0
        for number in range(file.num_row_groups):
            end = begin + file.metadata.row_group(number).num_rows
            if end <= shard.first:
                skipped = end
            elif begin < shard.first + shard.rows:
                groups.append(number)
            begin = end
        return file.read_row_groups(groups).slice(shard.first - skipped, shard.rows)
