"""Plan: the shards of a job, found and checked before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from foveate.batch import lines
from foveate.batch.arrow import arrow
from foveate.batch.job import Job
from foveate.errors import InputError
from foveate.io.quoting import quoted, shown
from foveate.io.reading import reason

SUFFIXES = (".jsonl", ".parquet")
SHARD_ROWS = 1000


@dataclass(frozen=True)
class Shard:
    """Rows that are answered into one file.

    Args:
        name: of that file, relative to the output.
        path: the input file.
        first: its first row there, 0-based.
        rows: how many.
        start: in jsonl, the byte at which it begins.
        size: bytes of the input file.
    """

    name: str
    path: Path
    first: int
    rows: int
    start: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        shards: in the order of their names.
        images: column of images.
        types: column -> kind of its values, of the jsonl files; see `foveate.batch.lines`.
    """

    shards: tuple[Shard, ...]
    images: str
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class _Source:
    """An input file: its columns, its rows, and in jsonl where shards begin."""

    path: Path
    columns: Mapping[str, Any]
    rows: int
    starts: Sequence[int]


def make_plan(job: Job) -> Plan:
    """Find the shards of a job, and check its columns.

    Raises:
        InputError: there is no input, a file cannot be read, or columns are missing or of the wrong
            type, or would be overwritten.
    """
    files = _files(job.input)
    single = job.shard_rows or (None if job.input.is_dir() else SHARD_ROWS)
    scans: list[lines.Scan] = []
    sources = [_look(path, single, scans) for path in files]
    if not sum(source.rows for source in sources):
        raise InputError(f"{shown(job.input, 100)} holds no rows")
    images = _image_column(job, sources)
    for source in sources:
        _check_columns(job, source, images)
    shards = [shard for source in sources for shard in _shards(job, source, single)]
    shards.sort(key=lambda shard: shard.name)
    for before, after in pairwise(shards):
        if before.name == after.name:
            raise InputError(
                f"{shown(before.path, 100)} and {shown(after.path, 100)} would both be answered in "
                f"{shown(after.name, 60)}; rename one of them"
            )
    return Plan(tuple(shards), images, lines.column_types(scans))


def _files(given: Path) -> list[Path]:
    """Input files: the one that is named, or those of a folder, hidden ones left out."""
    if not given.exists():
        raise InputError(f"no such file or folder: {shown(given, 100)}")
    if not given.is_dir():
        if given.suffix.lower() not in SUFFIXES:
            raise InputError(f"{shown(given, 100)}: the input's name ends in .jsonl or .parquet")
        return [given]
    found = [
        path
        for path in sorted(given.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part[0] in "._" for part in path.relative_to(given).parts)
    ]
    if not found:
        raise InputError(f"{shown(given, 100)} holds no file that ends in .jsonl or .parquet")
    return found


def _look(path: Path, shard_rows: int | None, scans: list[lines.Scan]) -> _Source:
    """Columns and rows of a file; what is seen of jsonl is added to `scans`."""
    try:
        if path.suffix.lower() == ".jsonl":
            scans.append(lines.scan(path, shard_rows))
            found = scans[-1]
            return _Source(path, found.kinds, found.rows, found.starts)
        _, parquet = arrow()
        with parquet.ParquetFile(path) as file:
            columns = {entry.name: entry.type for entry in file.schema_arrow}
            return _Source(path, columns, file.metadata.num_rows, ())
    except (OSError, ValueError) as error:  # pyarrow's are among them
        raise InputError(f"cannot read {shown(path, 100)}: {reason(error)}") from None


def _image_column(job: Job, sources: Sequence[_Source]) -> str:
    if job.images is not None:
        return job.images
    columns = sources[0].columns
    found = [name for name in ("images", "image") if name in columns]
    if len(found) != 1:
        what = "both a column images and image" if found else "no column images or image"
        raise InputError(
            f"{shown(sources[0].path, 100)} has {what}; name it with --image-column. Its columns: "
            f"{shown(', '.join(columns), 100)}"
        )
    return found[0]


def _check_columns(job: Job, source: _Source, images: str) -> None:
    """Refuse a file whose columns are missing, cannot be used, or would be overwritten."""
    file, columns = shown(source.path, 100), source.columns
    if not source.rows and not columns:  # an empty jsonl file
        return
    for option, name in (("--image-column", images), ("--question-column", job.question)):
        if name not in columns:
            raise InputError(
                f"{file} has no column {quoted(name)}; {option} names another. Its columns: "
                f"{shown(', '.join(columns), 100)}"
            )
    if source.path.suffix.lower() == ".parquet":
        if not _holds_images(columns[images]):
            raise InputError(
                f"the column {quoted(images)} of {file} holds {shown(columns[images])}: images are "
                "paths, bytes, data URLs, mappings with bytes or path, or lists of those"
            )
        if not _is_text(columns[job.question]):
            raise InputError(
                f"the column {quoted(job.question)} of {file} holds "
                f"{shown(columns[job.question])}, not text"
            )
    kept = set(columns) - set(job.drop)
    if taken := [name for name in job.results if name in kept]:
        raise InputError(
            f"{file} has a column {quoted(taken[0])} already; --prefix gives the new columns other "
            f"names, and --drop {shown(taken[0])} leaves the old one out"
        )


def _holds_images(kind: Any) -> bool:
    types = arrow()[0].types
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_images(kind.value_type)
    if types.is_struct(kind):
        return bool({"bytes", "path"} & {entry.name for entry in kind})
    return _is_text(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    types = arrow()[0].types
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _shards(job: Job, source: _Source, most: int | None) -> list[Shard]:
    """Shards of a file, with the names of their outputs."""
    stem = source.path.relative_to(job.folder).with_suffix("").as_posix()
    most = most or max(source.rows, 1)
    firsts = range(0, max(source.rows, 1), most)
    size = source.path.stat().st_size
    return [
        Shard(
            f"{stem}.parquet"
            if len(firsts) == 1
            else f"{stem}-{number:05}-of-{len(firsts):05}.parquet",
            source.path, first, min(most, source.rows - first),
            source.starts[number] if source.starts else 0, size,
        )
        for number, first in enumerate(firsts)
    ]  # fmt: skip
