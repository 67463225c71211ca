"""Remote shards, fetched whole ahead of their use into a cache on this machine's disk.

The processes of a machine share one folder of the cache. A file there is named by a hash of what it is a copy of, and
carries that name only when it is whole. Every agreement between processes is an flock, which goes with its process:

    KEY.part   being fetched by the process that holds its exclusive lock; without a lock it is a dead process's remains
    KEY.tar    a whole shard; whoever reads it holds a shared lock, and only what nobody has locked may be evicted
    KEY.idx    the index of a shard, its SHA-256 behind it
    lock       held while room is made

What is evicted first is what was last opened or let go the longest time ago. Shards that are wanted at once and do not
fit are read by ranges, one request a sample: slower, but nothing is fetched, evicted and fetched again in a circle.

Errors: a shard that the store does not have, or has in another size, is a ShardError (its samples are replaced); a store
that does not answer is an outage: it is asked again for `retry_for_s` and then ends the run with a UserError.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from data_tools.errors import UserError
from data_tools.files import Folder, RangeReader, RemoteFolder, format_bytes, is_url
from data_tools.shards import INDEX_SUFFIX, MANIFEST_NAME, Manifest, ShardError, ShardReader
from pretrain.config import ConfigModel, Count, Ratio

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_REQUEST_BYTES = 8 * 2**20
_LEAST_REQUEST_BYTES = 64 * 2**10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_POLL_S = 0.02
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
_OF_THE_CACHE = re.compile(r"[0-9a-f]{32}\.(tar|idx|part)")
_DIGEST_BYTES = 32
_MISTAKES = (TypeError, AttributeError, NameError, NotImplementedError)
"""Errors of a program rather than of a store: never tried again."""


class CacheConfig(ConfigModel):
    """Where copies of remote shards are kept on this machine, and how long a store is waited for."""

    folder: str | None = None  # null: image-text-pretrain in $XDG_CACHE_HOME or ~/.cache; a local disk, with flock
    limit_gib: Ratio = 100.0  # of the copies of all datasets on this machine
    download_threads: Count = 4  # for each dataset of a rank
    timeout_s: Ratio = 30.0  # for the answer to one request, of 8 MiB at most
    retry_for_s: float = pydantic.Field(default=300.0, ge=0)  # an outage of the store is survived for so long

    def locate(self) -> Path:
        """The folder, which need not exist."""
        if self.folder is not None:
            return Path(self.folder).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "image-text-pretrain"


class ReaderClosed(Exception):
    """A read that was under way, or began, after `close`."""


class NoRoom(Exception):
    """A file for which the cache cannot make room now; the text says why."""


# The store


class Calls:
    """Requests to stores: given up when they stall, made again when they fail, ended by `close` from another thread."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._running: set[Future] = set()
        self._answered = False
        self._told_s = -1e9

    def close(self) -> None:
        """Every call under way, and each later one, raises ReaderClosed."""
        self._closed.set()
        with self._lock:
            running = list(self._running)
        for future in running:
            future.cancel()

    def pause(self, seconds: float) -> None:
        """Sleep. Raises ReaderClosed."""
        if self._closed.wait(seconds):
            raise ReaderClosed

    def call(self, fs: Any, method: str, *arguments: Any, timeout_s: float, **options: Any) -> Any:
        """`fs.method(...)`, which is abandoned after `timeout_s` with a TimeoutError. Raises whatever the store raises."""
        self.pause(0)
        future = _start_call(fs, method, arguments, options)
        with self._lock:
            self._running.add(future)
        try:
            self.pause(0)  # `close` may have come before the call was among those that it ends
            return future.result(timeout_s)
        except CancelledError:
            self.pause(0)
            raise TimeoutError("the request was cancelled") from None
        except FutureTimeout as error:
            text = str(error) if future.done() else f"no answer in {timeout_s:g} s"
            raise TimeoutError(text or "the connection timed out") from None
        finally:
            future.cancel()
            with self._lock:
                self._running.discard(future)

    def retry(self, where: str, attempt: Callable[[int], Result]) -> Result:
        """The result of `attempt(failures so far)`, made until it succeeds, with ever longer pauses.

        Raises FileNotFoundError and ShardError at once, UserError after `retry_for_s` of failures. A refusal (403) before
        the first answer is believed at once: it is a mistake in the config, and not rights that are being renewed.
        """
        failures, first_s = 0, 0.0
        while True:
            try:
                result = attempt(failures)
                self._answered = True
                return result
            except (FileNotFoundError, ShardError):
                self._answered = True
                raise
            except (UserError, ReaderClosed, *_MISTAKES):
                raise
            except Exception as error:  # the libraries of stores have no error in common
                now_s = time.monotonic()
                first_s = first_s if failures else now_s
                failures += 1
                reason = f"{where}: {_describe(error)}"
                if _is_refusal(error) and not self._answered:
                    raise UserError(f"{reason}. Check the URL, and the rights of this user to read it") from None
                left_s = first_s + self.config.retry_for_s - now_s
                if left_s <= 0:
                    raise UserError(
                        f"{reason}. Given up after {now_s - first_s:.0f} s. Check that the store can be reached from this "
                        "machine, or raise data.cache.retry_for_s"
                    ) from None
                self._tell(f"{reason}. Trying again for {left_s:.0f} s", now_s)
                self.pause(min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S, left_s))

    def _tell(self, text: str, now_s: float) -> None:
        """Many threads meet one outage: it is told once in a while."""
        with self._lock:
            if now_s - self._told_s < self.config.timeout_s:
                return
            self._told_s = now_s
        log.warning("%s", text)


def _start_call(fs: Any, method: str, arguments: tuple, options: dict[str, Any]) -> Future:
    """Begin a call of a file system elsewhere: in fsspec's event loop, where the call can be ended, or in a thread of its
    own, which is left alone when it stalls."""
    if getattr(fs, "async_impl", False):
        return asyncio.run_coroutine_threadsafe(getattr(fs, "_" + method)(*arguments, **options), fs.loop)
    future: Future = Future()

    def run() -> None:
        try:
            result, error = getattr(fs, method)(*arguments, **options), None
        except BaseException as raised:
            result, error = None, raised
        with contextlib.suppress(Exception):  # nobody waits for it any more
            future.set_result(result) if error is None else future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=f"{method} of a store").start()
    return future


def _is_refusal(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    is_client_error = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, PermissionError) or is_client_error


def _describe(error: Exception) -> str:
    """One line: "ClientResponseError 503 Service Unavailable"."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    text = f"{status} {message}" if status and message else " ".join(str(error).split())
    name = type(error).__name__
    return f"{name} {text}" if text and not isinstance(error, TimeoutError) else text or name


class CachedFolder(RemoteFolder):
    """A remote folder of a dataset whose every request is patient, and whose indexes are kept in the cache.

    Where the store lists no sizes, the manifest's are taken: every shard is checked when it is first used.
    """

    def __init__(
        self, url: str, config: CacheConfig, calls: Calls | None = None, described: bytes | None = None
    ) -> None:
        super().__init__(url)
        self.config = config
        self.calls = calls or Calls(config)
        self._described = described  # the manifest that says that its tars are here, if it lies elsewhere
        self._manifest: bytes | None = None  # of this folder: read once, so that all that is read by it fits together

    def __reduce__(self) -> tuple:
        return CachedFolder, (self.url, self.config)

    def renew(self, calls: Calls) -> "CachedFolder":
        """The same folder, with other calls."""
        folder = CachedFolder(self.url, self.config, calls, self._described)
        folder._manifest = self._manifest
        return folder

    def exists(self) -> bool:
        return self.has_manifest() or super().exists()

    def has_manifest(self) -> bool:
        try:
            return bool(self.read(MANIFEST_NAME))
        except FileNotFoundError:
            return False

    def resolve(self, place: str) -> Folder:
        if not is_url(place):
            return super().resolve(place)
        return CachedFolder(place, self.config, self.calls, self._manifest)

    def sizes(self, endings: tuple[str, ...] = ("",)) -> dict[str, int]:
        sizes = super().sizes() or self._read_sizes()
        return {name: size for name, size in sizes.items() if name.endswith(endings)}

    def _list(self) -> list[dict[str, Any]]:
        fs = self._fs

        def attempt(failures: int) -> list[dict[str, Any]]:
            wait_s = 4 * self.config.timeout_s * 2 ** min(failures, 10)  # a store lists some 1,000 files a request
            try:
                return self.calls.call(fs, "ls", self._root, detail=True, timeout_s=wait_s)
            except Exception as error:
                if isinstance(error, FileNotFoundError | NotADirectoryError) or _is_refusal(error):
                    return []
                raise

        fs.invalidate_cache()
        return self.calls.retry(self.url, attempt)

    def _read_sizes(self) -> dict[str, int]:
        """Sizes as the manifest has them."""
        own = self.read(MANIFEST_NAME) if self.has_manifest() else None
        for manifest in (own, self._described):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # refused where the manifest itself is read
                shards = json.loads(manifest or b"")["shards"]
                indexes = {shard["name"] + INDEX_SUFFIX: 8 * (shard["samples"] + 1) for shard in shards}
                return {shard["name"]: shard["bytes"] for shard in shards} | indexes
        return {}

    def read(self, name: str) -> bytes:
        if name == MANIFEST_NAME:
            self._manifest = self._manifest or self._read(name)
            return self._manifest
        if not name.endswith(INDEX_SUFFIX):
            return self._read(name)
        salt = hashlib.sha256(self.read(MANIFEST_NAME)).hexdigest()  # the indexes of another build are others
        key, disk = _hash(self.locate(name), salt) + ".idx", DiskCache(self.config)
        content = disk.read(key)
        if content is None:
            content = self._read(name)
            disk.write(key, content, self.calls.pause)
        return content

    def _read(self, name: str) -> bytes:
        """The whole file. A slow store is given twice the time after each failure, as these files are of any size."""
        return self._ask("cat_file", name)

    def _info(self, name: str) -> dict[str, Any]:
        return self._ask("info", name)

    def _ask(self, method: str, name: str) -> Any:
        fs, path, wait_s = self._fs, f"{self._root}/{name}", self.config.timeout_s
        return self.calls.retry(
            self.locate(name),
            lambda failures: self.calls.call(fs, method, path, timeout_s=wait_s * 2 ** min(failures, 10)),
        )

    def open_ranges(self, name: str, size: int | None = None) -> "PatientRangeReader":
        return PatientRangeReader(self, name, size)

    def download(self, name: str, size: int, descriptor: int) -> None:
        """Write the whole file to an open one. Raises ShardError when it is not there, or of another size."""
        reader, position = self.open_ranges(name, size), 0
        while position < size:
            data = reader.read_some(position)
            _write_all(descriptor, data, position)
            position += len(data)


class LocalFolder(Folder):
    """A local folder whose manifest may say that its tars, or what it is a view of, are remote."""

    def __init__(self, path: str | Path, config: CacheConfig) -> None:
        super().__init__(path)
        self.config = config

    def resolve(self, place: str) -> Folder:
        if is_url(place):
            described = self.read(MANIFEST_NAME) if self.size(MANIFEST_NAME) else None
            return CachedFolder(place, self.config, described=described)
        return LocalFolder(os.path.normpath(self.path / place), self.config)


class PatientRangeReader:
    """Ranged reads of one remote file. With its `size` given, a file that is not there, or is of another, is a ShardError."""

    def __init__(self, folder: CachedFolder, name: str, size: int | None) -> None:
        self._calls, self._timeout_s = folder.calls, folder.config.timeout_s
        self._fs, self._path, self._where = folder._fs, f"{folder._root}/{name}", folder.locate(name)
        self._size, self._is_checked = size, size is None
        self._request_bytes = _REQUEST_BYTES

    def read(self, start: int, end: int) -> bytes:
        """These bytes, fewer only where the size is not known and the file ends.

        Raises ShardError (or FileNotFoundError), and UserError after an outage of `retry_for_s`.
        """

        def attempt(failures: int) -> bytes:
            if not self._is_checked:
                self._check_size()
                self._is_checked = True
            return self._request(start, end)[: end - start]

        return self._calls.retry(self._where, attempt)

    def read_some(self, start: int) -> bytes:
        """One byte or more of a file of known size from `start` on: what the link brings by one request. Raises as `read`."""
        began_s = 0.0

        def attempt(failures: int) -> bytes:
            nonlocal began_s
            began_s = time.monotonic()
            try:
                return self._request(start, min(start + self._request_bytes, self._size))
            except TimeoutError:  # perhaps of a slow link, not of a dead one: which asking for less finds out
                self._request_bytes = max(self._request_bytes // 2, _LEAST_REQUEST_BYTES)
                raise

        data = self._calls.retry(self._where, attempt)
        if time.monotonic() - began_s < self._timeout_s / 4:
            self._request_bytes = min(2 * self._request_bytes, _REQUEST_BYTES)
        return data

    def _request(self, start: int, end: int) -> bytes:
        """The bytes by one request, or all from `start` on from a server that knows no ranges."""
        wanted = end - start
        # One byte more than there should be shows a file that has grown, without a request of its own.
        beyond = int(end == self._size)
        data = self._fetch(start, end + beyond)
        if len(data) == wanted:
            return data
        if len(data) > wanted and self._size in (None, len(data)):
            return data[start:]
        if self._size is None:
            return data
        if len(data) > wanted:
            raise self._describe_size()
        self._check_size()
        raise OSError(f"only {len(data)} of {wanted} bytes came")

    def _check_size(self) -> None:
        """Raise ShardError unless the file ends behind its last byte."""
        if len(self._fetch(self._size - 1, self._size + 1)) not in (1, self._size):  # all, where no ranges are known
            raise self._describe_size()

    def _describe_size(self) -> ShardError:
        return ShardError(
            f"{self._where}: the store's file is not of {self._size} bytes, as the manifest says. Restore it from a copy, "
            "or build or index the dataset again"
        )

    def _fetch(self, start: int, end: int) -> bytes:
        """What is there of these bytes."""
        try:
            return self._calls.call(self._fs, "cat_file", self._path, start=start, end=end, timeout_s=self._timeout_s)
        except FileNotFoundError:
            if self._size is None:
                raise
            raise ShardError(f"{self._where}: the store has no such file. Restore it from a copy") from None
        except Exception as error:
            if getattr(error, "status", None) == 416 or getattr(error, "errno", None) == errno.EINVAL:
                return b""  # the file ends before them
            raise


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


# The disk


class CachedFile(RangeReader):
    """An open file of the cache. Until it closes, with its last reference, no process evicts it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.utime(descriptor)

    def __del__(self, touch: Any = os.utime, close: Any = os.close) -> None:
        touch(self._descriptor)  # it has been in use until now
        close(self._descriptor)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size


class DiskCache:
    """The files of the cache folder, shared by the processes of a machine. It has no state beside the folder."""

    def __init__(self, config: CacheConfig) -> None:
        """Raises UserError for a folder that cannot be made or written to."""
        self._folder = config.locate()
        self._limit_bytes = int(config.limit_gib * 2**30)
        self._patience_s = config.retry_for_s + config.timeout_s
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.close(self._open_lock())
        except OSError as error:
            raise UserError(
                f"{self._folder}: the cache of remote shards cannot be kept here: {error.strerror}. Give a folder on a "
                "local disk as data.cache.folder"
            ) from None

    def open(self, key: str, size: int | None = None) -> CachedFile | None:
        """The whole file of this name, else None. One that is not of `size` bytes is removed."""
        path = self._folder / key
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if not self._try_lock(descriptor, fcntl.LOCK_SH):
            os.close(descriptor)  # it is being evicted
            return None
        file = CachedFile(descriptor)
        if os.fstat(descriptor).st_nlink == 0:
            return None
        if size is not None and file.size() != size:
            path.unlink(missing_ok=True)
            return None
        return file

    def obtain(
        self,
        key: str,
        size: int,
        fill: Callable[[int], None],
        pause: Callable[[float], None],
        make_room: bool = True,
    ) -> CachedFile:
        """The file of this name, which `fill(descriptor)` writes if it is not there: in one process, others wait for it.

        `pause(seconds)` sleeps, and may raise. Raises NoRoom, and what `fill` raises.
        """
        part = self._folder / f"{key.partition('.')[0]}.part"
        self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it in the weeks of a run
        seen, since_s = None, time.monotonic()
        while (file := self.open(key, size)) is None:
            descriptor = self._open_part(part)
            if descriptor is not None:
                return self._fill(descriptor, part, key, size, fill, make_room)
            with contextlib.suppress(FileNotFoundError):
                if (now := part.stat().st_mtime_ns) != seen:
                    seen, since_s = now, time.monotonic()
            if time.monotonic() - since_s > self._patience_s:
                raise NoRoom(f"the process that is fetching {part} does not get on with it")
            pause(_POLL_S)
        return file

    def _fill(
        self, descriptor: int, part: Path, key: str, size: int, fill: Callable[[int], None], make_room: bool
    ) -> CachedFile:
        """Write the file behind the locked descriptor of its `part`, and give it its name."""
        try:
            if (file := self.open(key, size)) is None:  # else its name came between the look for it and the lock
                if make_room:
                    self._reserve(descriptor, part, size)
                fill(descriptor)
                os.fdatasync(descriptor)  # a power cut must not leave a file of the right size without its content
                os.rename(part, self._folder / key)
                self._try_lock(descriptor, fcntl.LOCK_SH)
                return CachedFile(descriptor)
            part.unlink()
            os.close(descriptor)
            return file
        except BaseException as error:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, OSError):  # the store's errors are others by now
                reason = "is full" if error.errno in _DISK_FULL else f"fails: {error.strerror}"
                raise NoRoom(f"its disk {reason}") from None
            raise

    def read(self, key: str) -> bytes | None:
        """What `write` has written, if it is there and whole."""
        file = self.open(key)
        if file is None:
            return None
        data = file.read(0, file.size())
        content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def write(self, key: str, content: bytes, pause: Callable[[float], None]) -> None:
        """Keep a small file, if there is room. It is counted when room is next made for a shard: to look through the folder
        for each of a hundred thousand indexes would take hours."""
        data = content + hashlib.sha256(content).digest()
        with contextlib.suppress(NoRoom):
            self.obtain(key, len(data), lambda descriptor: _write_all(descriptor, data, 0), pause, make_room=False)

    def _open_part(self, part: Path) -> int | None:
        """The file to write into, empty and locked for this process, or None while another one has it."""
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(FileNotFoundError):
            # Its name may have gone between the two calls: to the whole file, or with what a dead process had left.
            if self._try_lock(descriptor, fcntl.LOCK_EX) and os.path.samestat(os.fstat(descriptor), part.stat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        os.close(descriptor)
        return None

    def _reserve(self, descriptor: int, part: Path, size: int) -> None:
        """Give the open file so many bytes of the limit and of the disk, evicting others. Raises NoRoom."""
        if size > self._limit_bytes:
            raise NoRoom(f"{format_bytes(size)} are more than the limit of {format_bytes(self._limit_bytes)}")
        lock = self._open_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.remove_remains()
            files = sorted((facts.st_mtime_ns, path, facts.st_size) for path, facts in self._list() if path != part)
            excess = sum(file[2] for file in files) + size - self._limit_bytes
            with contextlib.closing(self._lock_unused(files)) as unused, contextlib.ExitStack() as locks:
                victims = []
                while excess > 0:
                    victim = next(unused, None)
                    if victim is None:  # evicting some where the rest is in use would help nobody
                        raise NoRoom(f"the shards in use fill the limit of {format_bytes(self._limit_bytes)}")
                    path, freed, locked = victim
                    victims.append(path)
                    locks.callback(os.close, locked)
                    excess -= freed
                for path in victims:
                    path.unlink()
                locks.close()  # what is still open still takes its place on the disk
                while not _allocate(descriptor, size):
                    victim = next(unused, None)
                    if victim is None:
                        raise NoRoom("its disk is full")
                    victim[0].unlink()
                    os.close(victim[2])
        finally:
            os.close(lock)

    def _lock_unused(self, files: Sequence[tuple[int, Path, int]]) -> Iterator[tuple[Path, int, int]]:
        """Path, size and locked descriptor of those files that no process reads, the one unused for longest first.

        The caller closes the descriptors.
        """
        for _, path, size in files:
            if path.suffix == ".part":
                continue
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if self._try_lock(descriptor, fcntl.LOCK_EX):
                    yield path, size, descriptor
                else:
                    os.close(descriptor)

    def remove_remains(self) -> None:
        """Remove what processes that have died were writing: the lock on it can be had."""
        for path, _ in self._list():
            if path.suffix == ".part":
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                    if self._try_lock(descriptor, fcntl.LOCK_EX):
                        path.unlink(missing_ok=True)
                    os.close(descriptor)

    def _list(self) -> list[tuple[Path, os.stat_result]]:
        """The files of the cache, and of nobody else."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _OF_THE_CACHE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((Path(entry.path), entry.stat()))
        return found

    def _open_lock(self) -> int:
        return os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _try_lock(self, descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{self._folder}: this file system has no locks. Give a folder on a local disk as data.cache.folder"
            ) from None


def _allocate(descriptor: int, size: int) -> bool:
    """Reserve so many bytes for the file; False when the disk is full."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _DISK_FULL:
            os.ftruncate(descriptor, 0)
            return False
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)
    return True


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


# The reader


class CachedReader(ShardReader):
    """A `ShardReader` of remote tars that fetches whole shards into the cache, those ahead in threads of its own.

    Safe to share between threads. A read of a shard that is not there yet waits for it. Close it when done: `close` ends
    its threads, and reads that are under way raise ReaderClosed.
    """

    def __init__(self, manifest: Manifest, cache: CacheConfig, max_open_shards: int = 512) -> None:
        """Raises UserError for a cache folder that cannot be used."""
        self._calls = Calls(cache)
        manifest = replace(manifest, tars=self._renew(manifest.tars), indexes=self._renew(manifest.indexes))
        super().__init__(manifest, max_open_shards)
        self._disk = DiskCache(cache)
        self._disk.remove_remains()
        self._cache = cache
        self._changed = threading.Condition()  # holds what follows
        self._wanted: list[int] = []
        self._under_way: set[int] = set()  # shards that a thread of ours is fetching ahead
        self._put_off: set[int] = set()  # wanted shards that cannot be fetched ahead now
        self._missing: dict[int, tuple[float, str]] = {}  # when a shard was found to be wrong, and how
        self._mistake: BaseException | None = None
        self._has_told = False
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._fetch_ahead, daemon=True, name=f"fetch {number}")
            for number in range(cache.download_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _renew(self, folder: Folder) -> Folder:
        if isinstance(folder, CachedFolder):
            return folder.renew(self._calls)
        return CachedFolder(folder.url, self._calls.config, self._calls) if isinstance(folder, RemoteFolder) else folder

    fetches = True

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Say which shards are wanted from now on, those being read included, in the order of need.

        Those that are not in the cache are fetched in that order; those no longer wanted may be evicted.
        """
        wanted = dict.fromkeys(int(number) for number in numbers)
        with self._changed:
            self._wanted = list(wanted)[: self._max_open_shards]
            self._put_off.clear()
            self._changed.notify_all()
        self._let_go(wanted)

    def close(self) -> None:
        """End the threads and close the files. A later read raises ReaderClosed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._calls.close()
        for thread in self._threads:
            thread.join()
        super().close()

    def _let_go(self, wanted: Iterable[int]) -> None:
        """Close the other shards, so that they can be evicted; one that is being read stays until that is done."""
        keep = set(wanted)
        with self._lock:
            for number in [number for number in self._open_shards if number not in keep]:
                del self._open_shards[number]

    def _open_shard(self, number: int, open_file: Callable[[int], Any]) -> Any:
        self._calls.pause(0)
        with self._changed:
            if self._mistake is not None:
                raise self._mistake
            since_s, reason = self._missing.get(number, (0.0, ""))
        # A shard that is wrong is asked for again now and then: somebody may have put it right.
        if reason and time.monotonic() - since_s < self._cache.retry_for_s:
            raise ShardError(reason)
        try:
            return super()._open_shard(number, open_file)
        except (ShardError, FileNotFoundError) as error:
            reason = str(error)
            if isinstance(error, FileNotFoundError):
                where = self._manifest.tars.locate(self._manifest.shards[number].name)
                reason = f"{where}: its index is not there: {error}. Restore it from a copy"
            with self._changed:
                self._missing[number] = time.monotonic(), reason
            raise ShardError(reason) from None

    def _open_file(self, number: int) -> Any:
        try:
            return self._fetch_file(number)
        except NoRoom:
            self._let_go(self._wanted)
        try:
            return self._fetch_file(number)
        except NoRoom as error:
            with self._changed:
                has_told, self._has_told = self._has_told, True
            if not has_told:
                log.warning(
                    "%s: %s, so shards are read from the store sample by sample, which is slow. Raise "
                    "data.cache.limit_gib, or give another data.cache.folder",
                    self._cache.locate(),
                    error,
                )
        shard = self._manifest.shards[number]
        return self._manifest.tars.open_ranges(shard.name, shard.bytes)

    def _fetch_file(self, number: int) -> CachedFile:
        """The shard's tar, whole, in the cache. Raises NoRoom."""
        tars, shard = self._manifest.tars, self._manifest.shards[number]
        # A dataset that is built again under the same URL has other hashes. Of tars of others only the headers have been
        # read, into a folder whose name changes with their times.
        version = (shard.sha256,) if shard.sha256 else (shard.index_sha256, str(self._manifest.indexes))
        key = _hash(tars.locate(shard.name), str(shard.bytes), *version) + ".tar"
        fill = partial(tars.download, shard.name, shard.bytes)
        return self._disk.obtain(key, shard.bytes, fill, self._calls.pause)

    def _fetch_ahead(self) -> None:
        """The body of a thread: fetch wanted shards, and hold them open so that they are not evicted before their use."""
        while True:
            with self._changed:
                while (number := self._choose()) is None and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                self._under_way.add(number)
            try:
                self._keep(number, self._open_shard(number, self._fetch_file))
                failed = False
            except (NoRoom, UserError):  # the read that needs it says so, or finds another way
                failed = True
            except ReaderClosed:
                return
            except BaseException as error:
                with self._changed:
                    self._mistake = error
                return
            with self._changed:
                self._under_way.discard(number)
                if failed:
                    self._put_off.add(number)
                is_wanted = number in self._wanted
            if not is_wanted:
                with self._lock:
                    self._open_shards.pop(number, None)

    def _choose(self) -> int | None:
        with self._lock:
            there = self._open_shards.keys() | self._under_way | self._put_off
        return next((number for number in self._wanted if number not in there), None)
