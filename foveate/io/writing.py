"""Writing results: paths are checked before the work, and a file is replaced whole or not at all.

A result is first written to a temporary file beside its destination. That file replaces the
destination once it is on the disk, so a full disk, an error or a kill leaves the earlier file as it
was.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, InputError
from foveate.io.quoting import shown

if TYPE_CHECKING:
    from PIL import Image

_STREAMS = ("/dev/std", "/dev/fd/", "/proc/")  # written to, never replaced
_MOUNTED = (
    errno.EBUSY,
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
)  # no other file can replace it
_FULL = ("No space left", "os error 28", "PytorchStreamWriter", "inline_container")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def check_file(path: str | Path | None, *, image: bool = False) -> None:
    """Refuse before the work, and not after it, a path at which no file can be saved.

    Args:
        path: of the file; `None` is fine.
        image: whether an image is saved, in the format that the name ends in.

    Raises:
        InputError: the folder is missing or takes no files, the path is a folder's, the file there
            is read-only, or no image can be saved under such a name.
    """
    if path is None:
        return
    with explained(path):
        if "\0" in str(path):
            raise InputError(f"cannot save {shown(path, 100)}: a name cannot hold a null byte")
        if image:
            _check_format(Path(path))
        for destination in dict.fromkeys((Path(path).absolute(), _target(path))):
            if not destination.parent.is_dir():
                above = (
                    Path(path).parent
                    if destination == Path(path).absolute()
                    else destination.parent
                )
                where = shown(above, 100)
                missing = not destination.parent.exists()
                reason = f"there is no folder {where}" if missing else f"{where} is a file"
                raise InputError(f"cannot save {shown(path, 100)}: {reason}")
        _try_file(path)


def check_folder(folder: str | Path) -> None:
    """Refuse before the work a folder in which nothing can be saved; it need not exist yet.

    Raises:
        InputError: it, or a folder above it, is a file or takes no files.
    """
    with explained(folder):
        if "\0" in str(folder):
            raise InputError(f"cannot save in {shown(folder, 100)}: a name cannot hold a null byte")
        here = Path(folder).absolute()
        while not _is_there(here):
            here = here.parent
        if not here.is_dir():
            what = "is a file" if here.exists() else "is a link that leads nowhere"
            raise InputError(
                f"cannot save in {shown(folder, 100)}: {shown(here, 100)} {what}, not a folder"
            )
        with tempfile.TemporaryFile(dir=here):
            pass


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Permissions of an earlier file are kept, and a link goes on to lead where it led. Pipes, devices
    and standard streams cannot be replaced; they are written to.

    Args:
        path: of the file.

    Yields:
        Where to write. When the block ends well, that file replaces `path`.

    Raises:
        InputError: the file cannot be written; what was there before is as it was.
    """
    with explained(path):
        if _is_stream(path):
            yield Path(path)
            return
        target = _target(path)
        folder = target.parent
        if target.exists() and not os.access(folder, os.W_OK):
            folder = Path(tempfile.gettempdir())
        part = folder / f".{secrets.token_hex(8)}{target.suffix[:16]}"
        try:
            yield part
            _finish(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Write several files into a folder: all of them, or none.

    Args:
        folder: where to; it is made if need be.

    Yields:
        A folder to write into. When the block ends well, its files go into `folder`, where they
        replace those of the same name and shards of an earlier model.

    Raises:
        InputError: they cannot be written; the folder is as it was.
    """
    check_folder(folder)
    with explained(folder), _made(Path(folder)), _staging(Path(folder)) as stage:
        yield stage
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        for name in files:
            _sync(stage / name)
        for name in files:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            _finish(stage / name, _target(Path(folder) / name))
        if any(name.name.startswith("model") for name in files):
            stale = {path for path in Path(folder).iterdir() if _SHARD.fullmatch(path.name)}
            for path in stale - {Path(folder) / name for name in files}:
                path.unlink()


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder if need be; if the block fails, a new one that is empty is removed."""
    new = not os.path.lexists(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # another process may write to it
                os.rmdir(folder)
        raise


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in another one, for as long as the block lasts."""
    stage = folder / f".{secrets.token_hex(8)}"
    try:
        stage.mkdir()
        card = folder / "README.md"
        if card.is_file():  # PEFT goes on with a model card that is there
            shutil.copyfile(card, stage / card.name)
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file or none; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file of UTF-8 or none; see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, data: Any, indent: int = 2) -> None:
    """Write a whole JSON file or none; see `replacing`."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append a JSON value as a line of its own, which is on the disk when this returns.

    Raises:
        InputError: the disk is full; the file is as it was.
    """
    line = (json.dumps(value) + "\n").encode()
    with explained(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:  # what fitted is no line
            file.truncate(end)
            raise


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a whole image file or none, in the format that the name ends in; see `replacing`.

    Raises:
        InputError: the format cannot hold the image, or the file cannot be written.
    """
    data = io.BytesIO()
    try:
        image.save(data, _format(Path(path)))
    except Exception as error:  # encoders raise all kinds
        raise InputError(f"cannot save {shown(path, 100)}: {shown(error, 100)}") from error
    write_bytes(path, data.getvalue())


@contextmanager
def explained(path: str | Path, *, only_full: bool = False) -> Iterator[None]:
    """What the system says when a file cannot be written, as one line.

    Args:
        path: what the line names.
        only_full: leave all errors alone but those of a full disk.

    Raises:
        InputError: an error of the system, or of a library that hit a full disk.
    """
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        if not is_full(error) and (only_full or not isinstance(error, OSError)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot save {shown(path, 100)}: {shown(reason, 100)}") from error


def is_full(error: BaseException) -> bool:
    """Whether an error comes of a full disk, whichever library raised it."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in _FULL)


def _is_there(path: Path) -> bool:
    """Whether something has that name, be it a link to nothing; a name too long is an error."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _target(path: str | Path) -> Path:
    """The file itself, with links resolved."""
    return Path(os.path.realpath(path))


def _is_stream(path: str | Path) -> bool:
    if os.path.abspath(path).startswith(_STREAMS):
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _try_file(path: str | Path) -> None:
    """Refuse a file that cannot be written, in a folder that is there."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        with tempfile.TemporaryFile(dir=_target(path).parent):
            return
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot save {shown(path, 100)}: it is a folder")
    if _is_stream(path):
        writable = os.access(path, os.W_OK)
    else:
        writable = bool(mode & 0o222)  # root could write to it all the same
        with open(path, "r+b"):
            pass
    if not writable:
        raise InputError(f"cannot save {shown(path, 100)}: the file is read-only")


def _finish(part: Path, target: Path) -> None:
    """Move a written file to its destination."""
    _sync(part)
    if target.exists():
        before = target.stat()
        if hasattr(os, "chown"):
            with suppress(OSError):  # only root gives files away
                os.chown(part, before.st_uid, before.st_gid)
        part.chmod(stat.S_IMODE(before.st_mode))
    try:
        os.replace(part, target)
    except OSError as error:
        if error.errno not in _MOUNTED or not target.is_file():
            raise
        shutil.copyfile(part, target)
    with suppress(OSError):  # not every system opens folders
        _sync(target.parent, os.O_RDONLY)


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    """On the disk, not only on its way there: some systems notice a full disk only now."""
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _format(path: Path) -> str | None:
    from PIL import Image  # late: most files are no images

    return Image.registered_extensions().get(path.suffix.lower())


def _check_format(path: Path) -> None:
    from PIL import Image

    try:
        if _format(path) is None:
            raise ValueError(path.suffix)
        Image.new("RGB", (8, 8)).save(io.BytesIO(), _format(path))
    except Exception:  # formats that are only read, or need a program, raise all kinds
        raise InputError(
            f"cannot save {shown(path, 100)}: an image's name ends in .png or .jpg, for example"
        ) from None
