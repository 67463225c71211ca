"""The on-disk contract of a shard folder: what the tools write and the training loader reads through.

    00000.tar         adjacent KEY.jpg, KEY.txt, KEY.json for each sample; deterministic USTAR (see tar.py)
    00000.tar.idx     uint64 little-endian: the offset of each sample's first byte, then the end of the last sample
    00000.parquet     one row for each input sample, failures included
    00000_stats.json  counts and hashes of the shard; written after its other files, so it says that they are complete
    sizes.json        {"00000.tar": samples, ...}, as open_clip reads it
    manifest.json     the list of shards with their hashes; written last, so it says that the build is complete

Sources: WebDataset (adjacent members of one key), img2dataset (sidecars), open_clip (sizes.json), NVIDIA Energon
(.tar.idx).
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.errors import UserError
from data_tools.files import open_atomic, write_atomic, write_json_atomic
from data_tools.tar import ARCHIVE_END, TarError, parse_members, render_member

FORMAT = 1
MANIFEST_NAME = "manifest.json"
SIZES_NAME = "sizes.json"
INDEX_SUFFIX = ".idx"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_EXTENSION = re.compile(r"[a-z0-9]+")


class ShardError(UserError):
    """A sample whose bytes cannot be trusted; the text names the shard, the sample and the offset."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, samples, size in bytes, and the SHA-256 of the tar and of its index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished build: `samples` pairs with `captions` captions, in `bytes` bytes of tars.

    `build` identifies the input and the options that made it; `options` are those options, for people to read.
    """

    directory: Path
    build: str
    samples: int
    failures: int
    captions: int
    bytes: int
    shards: tuple[ShardInfo, ...]
    options: dict[str, Any] = field(compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' hashes in order: equal for two folders exactly when their shards are."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read `directory`/manifest.json and check that the files beside it are the ones that it lists.

        The tars are checked by presence and size, the indexes by hash (they are small); the tars are not read.
        Raises UserError when there is no such folder, no or an unreadable manifest, another format, a tar that is
        missing, of another size or not listed, an index of another content, or not a single sample.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such folder. Give the folder that `python -m data_tools build` wrote")
        manifest = _parse_manifest(directory)
        unlisted = _list_tars(directory) - {shard.name for shard in manifest.shards}
        if unlisted:
            raise UserError(
                f"{directory}: holds tars that {MANIFEST_NAME} does not list (such as {min(unlisted)}, "
                f"{len(unlisted)} in all). They belong to another build: move them elsewhere"
            )
        for shard in manifest.shards:
            check_shard_files(directory, shard)
        if manifest.samples == 0:
            raise UserError(f"{directory}: the build holds no samples. See the error column of its .parquet files")
        return manifest

    @classmethod
    def of_shards(
        cls,
        directory: str | Path,
        shards: Sequence[ShardInfo],
        build: str = "",
        failures: int = 0,
        captions: int = 0,
        options: dict[str, Any] | None = None,
    ) -> "Manifest":
        """The manifest of these shards, their samples and bytes added up; `write` it when all of them are complete."""
        samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        return cls(Path(directory), build, samples, failures, captions, size, tuple(shards), options or {})

    def write(self) -> None:
        """Write sizes.json and then manifest.json into `directory`; the shards must be there already."""
        write_json_atomic(self.directory / SIZES_NAME, {shard.name: shard.samples for shard in self.shards})
        content = {
            "format": FORMAT,
            "build": self.build,
            "samples": self.samples,
            "failures": self.failures,
            "captions": self.captions,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
            "options": self.options,
        }
        write_json_atomic(self.directory / MANIFEST_NAME, content)


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in its shard: `fields` maps an extension ("jpg", "txt", "json") to the member's bytes."""

    key: str
    shard: str
    fields: dict[str, bytes]


class ShardReader:
    """Random access to the samples of a build: sample i is the i-th in the order of the manifest's shards.

    Safe to share between threads: reads are positional, and a shard that leaves the cache is closed only when no thread
    reads from it any more. At most `max_open_shards` files are kept open.
    """

    def __init__(self, manifest: Manifest, max_open_shards: int = 512) -> None:
        self._manifest = manifest
        self._ends = list(itertools.accumulate(shard.samples for shard in manifest.shards))
        self._max_open_shards = max_open_shards
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of samples."""
        return self._manifest.samples

    def read(self, index: int) -> RawSample:
        """Read sample `index` with one positional read, and verify its tar headers.

        Raises IndexError outside [0, len), and ShardError for bytes that are missing or a header that is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._manifest.shards[number]
        return self._open(number).read(index - (self._ends[number] - shard.samples))

    def close(self) -> None:
        """Close the cached files; a later `read` opens them again."""
        with self._lock:
            self._open_shards.clear()

    def _open(self, number: int) -> "_OpenShard":
        with self._lock:
            if number in self._open_shards:
                self._open_shards.move_to_end(number)
                return self._open_shards[number]
        # Opened outside the lock, so that a slow file system stops one thread and not all; the first to come back wins.
        opened = _OpenShard(self._manifest.directory, self._manifest.shards[number])
        with self._lock:
            shard = self._open_shards.setdefault(number, opened)
            if len(self._open_shards) > self._max_open_shards:
                self._open_shards.popitem(last=False)
            return shard


class _OpenShard:
    """An open tar with its index; the file closes with the last reference, so never under a thread that reads."""

    def __init__(self, directory: Path, info: ShardInfo) -> None:
        self._info = info
        self._path = directory / info.name
        self._offsets = load_index(directory, info)
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Any = os.close) -> None:
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, place: int) -> RawSample:
        start, end = int(self._offsets[place]), int(self._offsets[place + 1])
        where = f"{self._path}: sample {place} of {self._info.samples}, bytes {start} to {end}"
        advice = f"Restore {self._info.name} from a copy, or delete {MANIFEST_NAME} and this shard and build again"
        data = self._read_range(start, end)
        if len(data) < end - start:
            raise ShardError(f"{where}: the file ends after {len(data)} of {end - start} bytes. {advice}")
        try:
            members = parse_members(data)
        except TarError as error:
            raise ShardError(f"{where}: at byte {start + error.offset} {error.text}. {advice}") from None
        keys = {name.partition(".")[0] for name in members}
        if len(keys) != 1:
            raise ShardError(f"{where}: found the members of {len(keys)} keys, valid is one. {advice}")
        return RawSample(keys.pop(), self._info.name, {name.partition(".")[2]: data for name, data in members.items()})

    def _read_range(self, start: int, end: int) -> bytes:
        """One pread in practice; a read that the system cuts short is continued. Shorter only where the file ends."""
        data = os.pread(self._descriptor, end - start, start)
        while data and len(data) < end - start:
            more = os.pread(self._descriptor, end - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


class ShardWriter:
    """Appends samples to a tar, in constant memory. Made by `write_shard`; after its block `info` is set."""

    info: ShardInfo

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets = [0]
        self._hash = hashlib.sha256()

    def add(self, key: str, fields: Mapping[str, bytes]) -> tuple[int, int]:
        """Append a sample, members KEY.EXTENSION in the order of `fields`; return its offset and its size in bytes."""
        if not _KEY.fullmatch(key) or not all(_EXTENSION.fullmatch(extension) for extension in fields):
            raise ValueError(f"{key!r} with {list(fields)}: keys have ASCII letters, digits, '_' and '-', but no dot")
        offset = self._offsets[-1]
        size = sum(self._write(render_member(f"{key}.{extension}", data)) for extension, data in fields.items())
        self._offsets.append(offset + size)
        return offset, size

    def _finish(self, name: str) -> bytes:
        """End the archive, set `info` and return the index."""
        self._write(ARCHIVE_END)
        index = np.asarray(self._offsets, dtype="<u8").tobytes()
        self.info = ShardInfo(
            name=name,
            samples=len(self._offsets) - 1,
            bytes=self._offsets[-1] + len(ARCHIVE_END),
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        return index

    def _write(self, data: bytes) -> int:
        self._file.write(data)
        self._hash.update(data)
        return len(data)


@contextlib.contextmanager
def write_shard(path: str | Path) -> Iterator[ShardWriter]:
    """Write one tar and its index; they appear under their names, complete, when the block ends without an error."""
    path = Path(path)
    if not _SHARD_NAME.fullmatch(path.name):
        raise ValueError(f"{path}: a shard's name has letters, digits, '_' and '-', and ends in .tar")
    with open_atomic(path) as file:
        writer = ShardWriter(file)
        yield writer
        index = writer._finish(path.name)
    write_atomic(index_path(path), index)


def index_path(tar_path: Path) -> Path:
    """Where the index of a tar lies: 00000.tar -> 00000.tar.idx."""
    return tar_path.with_name(tar_path.name + INDEX_SUFFIX)


def load_index(directory: Path, shard: ShardInfo) -> np.ndarray:
    """The shard's sample offsets and its end offset, uint64 [samples + 1], in bytes.

    Raises ShardError when they do not rise from 0 to a place inside the tar.
    """
    path = index_path(directory / shard.name)
    offsets = np.fromfile(path, dtype="<u8")
    rising = len(offsets) == shard.samples + 1 and bool((offsets[1:] > offsets[:-1]).all())
    if not rising or offsets[0] != 0 or int(offsets[-1]) + len(ARCHIVE_END) > shard.bytes:
        raise ShardError(f"{path}: these are not the offsets of {shard.samples} samples. Restore it from a copy")
    return offsets


def _parse_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no {MANIFEST_NAME}: is it a finished build? Run `python -m data_tools build ...` into it "
            "again to finish it"
        ) from None
    except ValueError:
        raise UserError(f"{path}: not readable as JSON. Restore it from a copy, or delete it and build again") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}. This version reads format {FORMAT}: update it, or build again")
    try:
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        names = {key: content[key] for key in ("build", "samples", "failures", "captions", "bytes", "options")}
        manifest = Manifest(directory=directory, shards=shards, **names)
        consistent = manifest.samples == sum(shard.samples for shard in shards)
        consistent &= all(_SHARD_NAME.fullmatch(shard.name) for shard in shards)
    except (KeyError, TypeError):
        consistent = False
    if not consistent:
        raise UserError(f"{path}: entries are missing or contradict each other. Restore it from a copy, or build again")
    return manifest


def check_shard_files(directory: Path, shard: ShardInfo) -> None:
    """Raise UserError unless the shard's tar has its size and its index its hash. The tar is not read."""
    advice = f"Restore it from a copy, or delete {MANIFEST_NAME} and run the same build again"
    path = directory / shard.name
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing. {advice}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path}: {size} bytes, the manifest says {shard.bytes}. {advice}")
    index = index_path(path)
    if not index.is_file():
        raise UserError(f"{index}: this index is missing. {advice}")
    if hashlib.sha256(index.read_bytes()).hexdigest() != shard.index_sha256:
        raise UserError(f"{index}: not the index that the manifest lists. {advice}")


def _list_tars(directory: Path) -> set[str]:
    return {entry.name for entry in os.scandir(directory) if entry.name.endswith(".tar")}
