"""Job: what a run asks of which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import Method

RESULTS = ("answer", "error", "visual_tokens_before", "visual_tokens_after", "new_tokens")
"""Columns that a run adds."""


@dataclass(frozen=True)
class Job:
    """What is asked.

    Args:
        input: a file of questions, or a folder of such files; jsonl or Parquet.
        output: folder of the answers.
        model: hub id, local folder, `tiny` or `small`.
        methods: what removes visual tokens, in stream order; none for all tokens.
        images: column of images; `None` for `images` or `image`, whichever there is.
        question: column of questions.
        drop: columns that are not carried through.
        prefix: put before the names of `RESULTS`.
        max_new_tokens: longest answer.
        batch: rows that are answered together.
        shard_rows: most rows of a shard; `None` for 1,000 of a single file, and for whole files of
            a folder.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.
        hosts: names of hosts from which images are fetched.
        device: where models run.
        dtype: of their weights, or `auto`.
        keep_total: most visual tokens of a row; `None` for any number.
        retry_errors: whether shards with errors are done again.
    """

    input: Path
    output: Path
    model: str
    methods: tuple[Method, ...] = ()
    images: str | None = None
    question: str = "question"
    drop: tuple[str, ...] = ()
    prefix: str = ""
    max_new_tokens: int = 64
    batch: int = 8
    shard_rows: int | None = None
    max_pixels: int | None = None
    hosts: frozenset[str] = frozenset()
    device: str = "cpu"
    dtype: str = "auto"
    keep_total: int | None = None
    retry_errors: bool = False

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the columns that are added, in the order of `RESULTS`."""
        return tuple(self.prefix + name for name in RESULTS)

    @property
    def folder(self) -> Path:
        """Where paths of images begin."""
        return self.input if self.input.is_dir() else self.input.parent

    def settings(self) -> dict[str, Any]:
        """What answers depend on, as JSON values: shards of one output share it."""
        on_cpu = self.dtype == "auto" and self.device == "cpu"
        return {
            "input": str(self.input),
            "model": self.model,
            "methods": [method.to_dict() for method in self.methods],
            "keep_total": self.keep_total,
            "images": self.images,
            "question": self.question,
            "drop": list(self.drop),
            "prefix": self.prefix,
            "max_new_tokens": self.max_new_tokens,
            "max_pixels": self.max_pixels,
            "shard_rows": self.shard_rows,
            "dtype": "float32" if on_cpu else self.dtype,
        }
