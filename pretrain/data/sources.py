"""Opens what `data.path` names: a dataset or view with a manifest, or tars of others, local or behind a URL.

Tars without a manifest are indexed once: their headers are read and the indexes kept in the cache folder, under a name
that changes when a tar is replaced. One process of a machine does it, the others wait and find it done. Indexes of tars that
have been replaced, or have not been used for long, are removed when others are made.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UserError
from data_tools.files import Folder, RemoteFolder, is_url, lock_folder
from data_tools.index import find_tars, index_folder
from data_tools.shards import MANIFEST_NAME, STATE_NAME, Manifest, ShardReader
from pretrain.data.cache import CacheConfig, CachedFolder, CachedReader, LocalFolder

log = logging.getLogger(__name__)

_STREAM_PREFIX = "pipe:"
_FEW_TARS = 16
"""So many are indexed by this process: to start others takes seconds."""
_KEPT_INDEXES = 2
_INDEX_UNUSED_DAYS = 90
_held: dict[Path, int] = {}
"""Descriptors with a shared lock on the folders of indexes that this process uses."""


def is_stream(path: str) -> bool:
    """Whether `path` can only be read from its beginning to its end: see `pretrain.data.streaming`."""
    return path.startswith(_STREAM_PREFIX)


def load_dataset(path: str, cache: CacheConfig) -> Manifest:
    """The dataset at a folder, a URL, or the tars that a pattern names: "s3://bucket/{00000..01023}.tar", "/data/*.tar".

    Raises UserError for what is not there, is not whole or cannot be reached, and for a `pipe:`.
    """
    if is_stream(path):
        raise UserError(f"{path}: a pipe has no order that could be exact, so it cannot be opened here")
    is_folder = not is_url(path) and Path(path).is_dir()  # which may have any letters in its name
    if not is_folder and (path.endswith(".tar") or any(letter in path for letter in "{*?[")):
        return _index_once(path, cache)
    folder = _open_folder(path, cache)
    names = [MANIFEST_NAME] if isinstance(folder, CachedFolder) and folder.has_manifest() else folder.names()
    # A folder with the state of a build is one that has not finished: to load it says what to do about that.
    is_foreign = MANIFEST_NAME not in names and STATE_NAME not in names and any(name.endswith(".tar") for name in names)
    return _index_once(path, cache) if is_foreign else Manifest.load(folder)


def open_reader(manifest: Manifest, cache: CacheConfig, max_open_shards: int = 512) -> ShardReader:
    """Reads local shards in place, remote ones through the cache. To be closed."""
    if isinstance(manifest.tars, RemoteFolder):
        return CachedReader(manifest, cache, max_open_shards)
    return ShardReader(manifest, max_open_shards)


def _open_folder(path: str, cache: CacheConfig) -> Folder:
    return CachedFolder(path, cache) if is_url(path) else LocalFolder(path, cache)


def _index_once(path: str, cache: CacheConfig) -> Manifest:
    """The manifest of the tars that `path` names, from the cache if they are as they were when it was made."""
    folder, names = find_tars([path], lambda place: _open_folder(place, cache))
    place = str(folder) if isinstance(folder, RemoteFolder) else str(folder.path.resolve())
    of_path = cache.locate() / "indexes" / _hash(place, path)
    target = LocalFolder(of_path / _hash(*names, *folder.stamps(names)), cache)
    try:
        of_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{of_path}: the indexes of {path} cannot be kept here: {error.strerror}. Give another data.cache.folder"
        ) from None
    with _lock(of_path, path):
        if target.size(MANIFEST_NAME) is not None:
            _hold(target.path)
            return Manifest.load(target)
        # Of a level that is shown: this may take long, and a job's output is no terminal with a progress bar.
        log.warning("%s: reading the headers of %d tars, once", path, len(names))
        processes = None if len(names) > _FEW_TARS else 1
        manifest, facts = index_folder(folder, names, target, prefix_keys=None, processes=processes)
        _hold(target.path)
        remove_old_indexes(cache.locate() / "indexes")
    if facts["duplicate_keys"]:
        log.warning(
            "%s: %d samples have the key of another (such as %s), so every key gets its tar's name before it",
            path,
            facts["duplicate_keys"],
            facts["duplicate_key"],
        )
    log.warning("%s: %d samples in %d tars", path, manifest.samples, len(names))
    return manifest


def _hold(folder: Path) -> None:
    """Keep a folder of indexes from being removed as long as this process runs, and note that it has been used."""
    if folder not in _held:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _held[folder] = descriptor
    os.utime(folder)


def remove_old_indexes(indexes: Path) -> None:
    """Remove the folders of indexes that no process uses: all but the _KEPT_INDEXES used last of each pattern of tars, and those
    unused for _INDEX_UNUSED_DAYS."""
    oldest_s = time.time() - 86_400 * _INDEX_UNUSED_DAYS
    for of_path in indexes.iterdir():
        with contextlib.suppress(OSError):  # another process may remove them, too
            used = sorted(((folder.stat().st_mtime, folder) for folder in of_path.iterdir()), reverse=True)
            old = [
                folder for number, (used_s, folder) in enumerate(used) if number >= _KEPT_INDEXES or used_s < oldest_s
            ]
            for folder in old:
                descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                except OSError:  # it is in use, or nobody can tell
                    pass
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _lock(folder: Path, path: str) -> Iterator[None]:
    """Hold `folder`, for which another process may have to end its work first."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except UserError:
            log.warning("%s: another process is reading the headers of its tars; waiting for it", path)
            stack.enter_context(lock_folder(folder, wait=True))
        yield


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
