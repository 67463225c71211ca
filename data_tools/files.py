"""Files that are complete when they stand under their final name: temporary name, fsync, rename, fsync of folder.

`open_folder` gives one view of a flat folder, whether it is local or behind a URL that fsspec knows (s3://, gs://, ...).
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_VERSION_TAGS = ("size", "ETag", "etag", "md5Hash", "content_md5", "generation")
_VERSION_TAGS += ("LastModified", "last_modified", "Last-Modified", "mtime", "created")
"""What fsspec's file systems tell of a file that changes with its content."""


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file for binary writing; it appears under `path` only when the block ends without an error.

    The data lies in the same folder under `NAME.XXXXXXXX.tmp` until then, and is removed on an error. Raises OSError
    with `filename` set to `path`, also for a disk that fills up during a write.
    """
    with _publish_together() as begin, begin(Path(path)) as file:
        yield file


class _Draft:
    """A file with a temporary name, and the path where it is to appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        self.file: BinaryIO | None = None

    def open(self) -> None:
        try:
            self.file = open(self.temporary, "xb")
        except OSError as error:
            error.filename = str(self.path)
            raise

    def discard(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    @contextlib.contextmanager
    def blame(self) -> Iterator[None]:
        """Let an OSError of this file, or of a write into it, name `path`."""
        try:
            yield
        except OSError as error:
            if error.filename in (None, str(self.temporary), self.temporary):
                error.filename, error.filename2 = str(self.path), None
            raise

    def sync(self) -> None:
        with self.blame():
            os.fsync(self.file.fileno())


@contextlib.contextmanager
def _publish_together() -> Iterator[Callable[[Path], contextlib.AbstractContextManager[BinaryIO]]]:
    """Yields what begins a file. All that were begun get their names, in that order, when the block ends without an
    error: each is whole on the disk before the first gets its name."""
    drafts: list[_Draft] = []

    @contextlib.contextmanager
    def begin(path: Path) -> Iterator[BinaryIO]:
        draft = _Draft(path)
        drafts.append(draft)  # before the file is there: Ctrl-C may come right after
        draft.open()
        with draft.blame():
            yield draft.file
            draft.file.flush()

    try:
        yield begin
        if len(drafts) == 1:
            drafts[0].sync()
        elif drafts:  # at once: a file system writes its journal for all who wait
            with concurrent.futures.ThreadPoolExecutor(len(drafts)) as threads:
                list(threads.map(_Draft.sync, drafts))
        for draft in drafts:
            with draft.blame():
                draft.file.close()
                os.replace(draft.temporary, draft.path)
        for folder in dict.fromkeys(draft.path.parent for draft in drafts):
            sync_folder(folder)
    except BaseException:
        for draft in drafts:
            draft.discard()
        raise


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a run after a crash, sees the old file or the whole new one."""
    with open_atomic(path) as file:
        file.write(data)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON with a final newline: the same value always makes the same bytes."""
    write_atomic(path, render_json(value))


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object, in one write, so that lines of several writers never mix; on the disk when this returns."""
    line = json.dumps(value) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a crash has cut the line before
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def render_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class Folder:
    """A flat folder of files on a local disk. A file appears under its name complete, or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    def locate(self, name: str) -> str:
        """Where the file is, for people and for readers of other libraries."""
        return str(self.path / name)

    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the files and folders inside, sorted; none where the folder does not exist."""
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def sizes(self, endings: tuple[str, ...] = ("",)) -> dict[str, int]:
        """Bytes of every file inside whose name has one of these endings, by name. Only those are asked for their size."""
        if not self.path.is_dir():
            return {}
        sizes = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(endings) and entry.is_file():
                    with contextlib.suppress(FileNotFoundError):  # a writer beside us has renamed or removed it
                        sizes[entry.name] = entry.stat().st_size
        return sizes

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None where there is no such file."""
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):  # it may go between the two questions, too
            return path.stat().st_size if path.is_file() else None
        return None

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return (self.path / name).read_bytes()

    def open_ranges(self, name: str) -> "RangeReader":
        return RangeReader(self.path / name)

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file to write; see `open_atomic`."""
        return open_atomic(self.path / name)

    @contextlib.contextmanager
    def together(self) -> Iterator["Folder"]:
        """This folder, but the files that are written into it in the block appear at its end, in the order in which they
        were begun, once all are whole. It costs little more than one file does."""
        with _publish_together() as begin:
            yield _TogetherFolder(self.path, begin)

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, render_json(value))

    def remove(self, name: str) -> None:
        """Remove the file if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def lock(self, exclusive: bool = True) -> contextlib.AbstractContextManager[None]:
        return lock_folder(self.path, exclusive)

    def resolve(self, place: str) -> "Folder":
        """The folder that a file in this one names: a URL, or a path that begins here."""
        target = open_folder(place)
        return target if isinstance(target, RemoteFolder) else Folder(os.path.normpath(self.path / target.path))

    def stamps(self, names: Iterable[str]) -> list[str]:
        """For each file a text that is another one when the file has been replaced. Raises FileNotFoundError."""
        facts = [(self.path / name).stat() for name in names]
        return [f"{fact.st_size} {fact.st_mtime_ns}" for fact in facts]


class _TogetherFolder(Folder):
    def __init__(self, path: Path, begin: Callable[[Path], contextlib.AbstractContextManager[BinaryIO]]) -> None:
        super().__init__(path)
        self._begin = begin

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return self._begin(self.path / name)


def read_open_file(descriptor: int, size: int) -> bytes:
    """All bytes of a file that was just opened and said to have `size`; one system call, unless it had not."""
    data = os.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    while parts[-1]:
        parts.append(os.read(descriptor, 2**20))
    return b"".join(parts)


def read_regular_file(path: str, limit: int, refuse: Callable[[str, str], Exception], name: str) -> bytes:
    """The bytes of a regular file. Raises `refuse(reason, detail)`, which calls it `name`, for anything else and for one of
    more than `limit` bytes; OSError as it is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name must not hang us
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refuse("not a file", name)
        if status.st_size > limit:
            raise refuse("file too large", f"{name} has {status.st_size} bytes, at most {limit} are read")
        return read_open_file(descriptor, status.st_size)
    finally:
        os.close(descriptor)


class RangeReader:
    """Positional reads of one file; safe to share between threads. It closes with the last reference to it, so never
    under a thread that reads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Any = os.close) -> None:
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, start: int, end: int) -> bytes:
        """One pread in practice; a read that the system cuts short is continued. Shorter only where the file ends."""
        data = os.pread(self._descriptor, end - start, start)
        while data and len(data) < end - start:
            more = os.pread(self._descriptor, end - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


class RemoteFolder(Folder):
    """The same behind an fsspec URL. An object store shows an object when it is whole; other stores get it by rename.

    One writer at a time is the user's affair: such stores have no locks.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def _fs(self) -> Any:
        """The file system; fsspec keeps one for each process, so this object can be pickled."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {error}") from None

    @property
    def _root(self) -> str:
        return self._fs._strip_protocol(self.url)

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    def exists(self) -> bool:
        return bool(self._list())

    def make(self) -> None:
        self._fs.makedirs(self._root, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list())

    def sizes(self, endings: tuple[str, ...] = ("",)) -> dict[str, int]:
        """As of a local folder; without those whose size the store does not list, as HTTP servers do."""
        files = [entry for entry in self._list() if entry["type"] == "file" and entry.get("size") is not None]
        sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in files}
        return {name: size for name, size in sizes.items() if name.endswith(endings)}

    def _info(self, name: str) -> dict[str, Any]:
        return self._fs.info(f"{self._root}/{name}")

    def _list(self) -> list[dict[str, Any]]:
        try:
            return self._fs.ls(self._root, detail=True, refresh=True)
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        try:
            return self._info(name)["size"]
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._root}/{name}")

    def open_ranges(self, name: str) -> "RemoteRangeReader":
        return RemoteRangeReader(self, name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Written to a local temporary file, and sent when the block ends without an error."""
        with tempfile.TemporaryFile() as file:
            yield file
            size = file.tell()
            file.seek(0)
            path, fs = f"{self._root}/{name}", self._fs
            temporary = f"{path}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
            try:
                with fs.open(temporary, "wb") as target:
                    shutil.copyfileobj(file, target, 2**22)
                if fs.info(temporary)["size"] != size:
                    raise OSError(errno.EIO, "the store holds another number of bytes than were sent", path)
                fs.mv(temporary, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    fs.rm_file(temporary)
                raise

    @contextlib.contextmanager
    def together(self) -> Iterator[Folder]:
        yield self  # an object is whole when it is there, and needs no sync

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def lock(self, exclusive: bool = True) -> Iterator[None]:
        yield

    def resolve(self, place: str) -> Folder:
        return open_folder(place)

    def stamps(self, names: Iterable[str]) -> list[str]:
        listed = {entry["name"].rpartition("/")[2]: entry for entry in self._list() if entry.get("size") is not None}
        entries = [listed.get(name) or self._info(name) for name in names]
        return [" ".join(str(entry[tag]) for tag in _VERSION_TAGS if entry.get(tag) is not None) for entry in entries]


class RemoteRangeReader:
    """Ranged reads of one object behind a URL."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._fs, self._path = folder._fs, f"{folder._root}/{name}"
        self._fs.info(self._path)  # a missing object is an error now, not at the first read

    def read(self, start: int, end: int) -> bytes:
        data = self._fs.cat_file(self._path, start=start, end=end)
        return data[start:end] if len(data) > end - start else data  # of a server that knows no ranges: all of it


def is_url(place: str | Path) -> bool:
    """Whether this is scheme://... rather than a path; file:// counts as a path's URL too."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def open_folder(place: "str | Path | Folder") -> Folder:
    """The folder at a local path or an fsspec URL; it need not exist."""
    if isinstance(place, Folder):
        return place
    return RemoteFolder(place) if is_url(place) else Folder(place)


@contextlib.contextmanager
def lock_folder(folder: str | Path, exclusive: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for one writer at a time, or for several that do not get in each other's way; the lock goes with
    the process, however that ends.

    Raises UserError when another process holds it, unless it is to `wait`. A file system without locks is used without.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
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
