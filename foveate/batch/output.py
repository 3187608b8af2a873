"""The output: a Parquet file for each shard, and a note of what they were answered with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.batch.arrow import arrow
from foveate.batch.job import Job
from foveate.batch.plan import Plan, Shard
from foveate.errors import InputError
from foveate.integrations.chat import Answer
from foveate.io.quoting import quoted, shown
from foveate.io.reading import parse_json, read_text, reason
from foveate.io.writing import check_folder, explained, replacing, write_json

NOTE = "_foveate.json"
"""Settings and shards of an output; readers of Parquet pass over names that begin so."""
LOCK = ".lock"
_KEY = b"foveate"
_WHAT = "foveate batch"


@dataclass(frozen=True)
class Totals:
    """Sums over rows.

    Args:
        rows: answered or with an error.
        errors: those with an error.
        visual_before: visual tokens.
        visual_after: those that survive.
        new_tokens: of the answers.
    """

    rows: int = 0
    errors: int = 0
    visual_before: int = 0
    visual_after: int = 0
    new_tokens: int = 0

    def __add__(self, other: Totals) -> Totals:
        """The sums over both."""
        mine, others = asdict(self), asdict(other)
        return Totals(**{name: mine[name] + others[name] for name in mine})


def write_shard(
    job: Job, shard: Shard, table: Any, answers: Sequence[tuple[Answer | None, str | None]]
) -> Totals:
    """Write the rows of a shard with their answers, all or none.

    Args:
        job: what was asked.
        shard: which shard.
        table: its rows, as they came.
        answers: an answer or an error for each.

    Raises:
        InputError: the file cannot be written.
    """
    pa, parquet = arrow()
    said = [answer for answer, _ in answers]
    found = [answer for answer in said if answer is not None]
    totals = Totals(
        len(answers), len(answers) - len(found),
        sum(a.visual_before or 0 for a in found), sum(a.visual_after or 0 for a in found),
        sum(a.tokens for a in found),
    )  # fmt: skip
    columns = (
        pa.array([None if a is None else a.text.strip() for a in said], pa.string()),
        pa.array([error for _, error in answers], pa.string()),
        pa.array([None if a is None else a.visual_before for a in said], pa.int64()),
        pa.array([None if a is None else a.visual_after for a in said], pa.int64()),
        pa.array([None if a is None else a.tokens for a in said], pa.int64()),
    )
    table = table.drop_columns([name for name in job.drop if name in table.column_names])
    for name, column in zip(job.results, columns, strict=True):
        table = table.append_column(name, column)
    table = table.replace_schema_metadata({_KEY: json.dumps(asdict(totals))})
    path = job.output / shard.name
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        parquet.write_table(table, part, compression="zstd")
    return totals


def totals_of(job: Job, shard: Shard) -> Totals | None:
    """The sums of a shard that is done; `None` where it is not, or its file is damaged."""
    pa, parquet = arrow()
    try:
        metadata = parquet.read_metadata(job.output / shard.name).metadata or {}
        totals = Totals(**json.loads(metadata[_KEY]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return totals if totals.rows == shard.rows else None


def is_done(job: Job, totals: Totals | None) -> bool:
    """Whether a shard needs no more work."""
    return totals is not None and not (job.retry_errors and totals.errors)


def check_output(job: Job, plan: Plan) -> None:
    """Refuse an output that cannot be written to, or that holds answers of something else.

    Raises:
        InputError: so it is; the message names what differs.
    """
    folder = shown(job.output, 100)
    check_folder(job.output)
    inside = job.output.resolve()
    if job.input.is_dir() and inside.is_relative_to(job.input.resolve()):
        raise InputError(f"the output {folder} lies within the input; name another folder")
    if not (job.output / NOTE).is_file():
        if job.output.is_dir() and any(job.output.rglob("[!.]*.parquet")):
            raise InputError(
                f"{folder} holds Parquet files of something else; name an empty or a new folder"
            )
        return
    note = _read_note(job.output / NOTE)
    _compare(note["settings"], job.settings(), folder)
    _compare_shards(note["shards"], _shards(plan), folder)


def write_note(job: Job, plan: Plan) -> None:
    """Note what the shards of an output are answered with.

    Raises:
        InputError: it cannot be written.
    """
    with explained(job.output):
        job.output.mkdir(parents=True, exist_ok=True)
    data = {"what": _WHAT, "settings": job.settings(), "shards": _shards(plan)}
    write_json(job.output / NOTE, data)


def clear_remains(job: Job) -> None:
    """Delete temporary files of runs that were killed; only who holds the lock may."""
    for path in job.output.rglob(".*.parquet"):
        with explained(path):
            path.unlink(missing_ok=True)


def _shards(plan: Plan) -> dict[str, list[int]]:
    return {shard.name: [shard.rows, shard.size] for shard in plan.shards}


def _read_note(path: Path) -> Any:
    try:
        note = parse_json(read_text(path))
        if note["what"] != _WHAT or not isinstance(note["shards"], dict):
            raise ValueError("it is of something else")
        dict(note["settings"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"cannot read {shown(path, 100)}: {reason(error)}; name another folder"
        ) from None
    return note


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: str) -> None:
    """Refuse other settings."""
    for name in {**new, **old}:
        if old.get(name) != json.loads(json.dumps(new.get(name))):
            raise InputError(
                f"{folder} was begun with other settings: {name} was {quoted(old.get(name), 80)} "
                f"and is {quoted(new.get(name), 80)}; give the same, or name another folder"
            )


def _compare_shards(old: Mapping[str, Any], new: Mapping[str, Any], folder: str) -> None:
    """Refuse an input whose known shards have changed; new ones are welcome."""
    for name, facts in old.items():
        if new.get(name) != facts:
            now = "is gone" if name not in new else "has changed"
            raise InputError(
                f"the input of {shown(name, 60)} {now} since {folder} was begun; name another "
                "folder"
            )
