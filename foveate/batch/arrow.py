"""pyarrow, imported where it is used."""

from __future__ import annotations

from typing import Any

from foveate.errors import InputError


def arrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        InputError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "answers are stored as Parquet, which needs pyarrow: pip install 'foveate[bench]'"
        ) from None
    return pyarrow, pyarrow.parquet
