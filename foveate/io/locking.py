"""Keeping two runs from writing to the same place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.errors import InputError
from foveate.io.writing import explained


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock for as long as the block lasts; it ends with the process too.

    Where the system knows no locks, runs are not kept apart.

    Args:
        path: the lock's file, which is made and stays.
        message: what to say where another process holds it.

    Raises:
        InputError: another process holds it, or its file cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("w")
    with opened as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(message) from None
        except (ImportError, OSError):  # no POSIX system, or a file system without locks
            pass
        yield
