"""Files that are complete when they stand under their final name: temporary name, fsync, rename, fsync of folder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file for binary writing; it appears under `path` only when the block ends without an error.

    The data lies in the same folder under `NAME.XXXXXXXX.tmp` until then, and is removed on an error. Raises OSError
    with `filename` set to `path`, also for a disk that fills up during a write.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a run after a crash, sees the old file or the whole new one."""
    with open_atomic(path) as file:
        file.write(data)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON with a final newline: the same value always makes the same bytes."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for one writer at a time; the lock goes with the process, however that ends.

    Raises UserError when another process holds it. A file system without locks is used without one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing here. Wait for it to end, or end it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: str | Path) -> None:
    """Make renames in `folder` survive a power cut, where the file system lets folders be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def hash_file(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def format_bytes(count: int) -> str:
    """A size for people: 999 B, 1.5 MB, 20.0 GB (powers of 1000)."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while size >= 1000 and unit != "PB":
        size, unit = size / 1000, next(units)
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def format_counts(counts: Mapping[str, int]) -> str:
    """The most frequent first: "missing picture 12, no caption 3"."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda entry: -entry[1]))
