"""The on-disk contract of a shard folder: what the tools write and the training loader reads through.

    00000.tar         adjacent KEY.jpg, KEY.txt, KEY.json for each sample; deterministic USTAR (see tar.py)
    00000.tar.idx     uint64 little-endian: the offset of each sample's first byte, then the end of the last sample
    00000.parquet     one row for each input sample, failures included
    00000_stats.json  counts and hashes of the shard; written after its other files, so it says that they are complete
    sizes.json        {"00000.tar": samples, ...}, as open_clip reads it
    checksums.json    SHA-256 of the other small files, for `verify`: the sidecars, statistics, sizes.json, manifest.json
    manifest.json     the list of shards with their hashes; written last, so it says that the build is complete

A folder whose manifest.json has a `tars` entry holds indexes of tars that lie elsewhere. One with a `view` entry selects
samples of another dataset by selection.bin: for each shard, one bit a sample in the order of the tar, padded to a byte.
quarantine.json, written by `verify`, takes samples out: {"00000.tar": {"12": reason, ...}, ...} by place in the tar.

Sources: WebDataset (adjacent members of one key), img2dataset (sidecars), open_clip (sizes.json), NVIDIA Energon
(.tar.idx).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_tools.errors import UserError
from data_tools.files import Folder, open_folder, render_json
from data_tools.tar import (
    ARCHIVE_END,
    BLOCK_BYTES,
    TarError,
    is_sample_file,
    parse_members,
    render_header,
    split_name,
)

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
MANIFEST_NAME = "manifest.json"
SIZES_NAME = "sizes.json"
SELECTION_NAME = "selection.bin"
QUARANTINE_NAME = "quarantine.json"
CHECKSUMS_NAME = "checksums.json"
STATE_NAME = "build.json"
RETRY_NAME = "retry.json"
"""Written while `retry` adds shards: {"shards": [their tars]}. They are not of the dataset until it has finished."""
INDEX_SUFFIX = ".idx"

_ADVICE = f"Restore it from a copy, or delete {MANIFEST_NAME} and run the same build again"
_SENT_AT_ONCE = 8 * 2**20

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_ONES = bytes(bin(byte).count("1") for byte in range(256))  # bits set in a byte
_LOST = (errno.ENOENT, errno.ESTALE, errno.EIO)
"""What a storage says of a file, or a part of one, that it has lost."""


class ShardError(UserError):
    """A sample whose bytes cannot be trusted; the text names the shard, the sample and the offset."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, samples, size in bytes, and the SHA-256 of the tar and of its index.

    `sha256` is "" for a tar of others of which only the headers have been read.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Selection:
    """Which samples of some shards count: a packed bit for each sample, every shard beginning at a byte."""

    bits: np.ndarray  # uint8 [bytes]
    starts: np.ndarray  # int64 [shards + 1], where in `bits` each shard begins

    @classmethod
    def of_masks(cls, masks: Iterable[np.ndarray]) -> "Selection":
        """From a bool array [samples] for each shard."""
        packed = [np.packbits(np.asarray(mask, dtype=bool)) for mask in masks]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in packed], dtype=np.int64)])
        return cls(np.concatenate([np.zeros(0, np.uint8), *packed]), starts)

    @classmethod
    def of_all(cls, samples: np.ndarray) -> "Selection":
        """All samples of shards that have so many, int64 [shards]."""
        starts = np.concatenate([[0], np.cumsum((samples + 7) // 8, dtype=np.int64)])
        bits = np.full(starts[-1], 0xFF, np.uint8)
        padded = np.flatnonzero(samples % 8)
        bits[starts[padded + 1] - 1] = 0xFF << (8 - samples[padded] % 8) & 0xFF
        return cls(bits, starts)

    def without(self, places: Mapping[int, np.ndarray]) -> "Selection":
        """The same but for the samples at these places of the tars of some shards, by the shard's number."""
        bits = self.bits.copy()
        for number, taken in places.items():
            np.bitwise_and.at(bits, self.starts[number] + taken // 8, ~(0x80 >> taken % 8).astype(np.uint8))
        return Selection(bits, self.starts)

    def mask(self, number: int, samples: int) -> np.ndarray:
        """bool [samples] of shard `number`, which has so many."""
        return np.unpackbits(self.bits[self.starts[number] : self.starts[number + 1]], count=samples).astype(bool)

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards]: samples that count."""
        counts = np.zeros(len(self.starts) - 1, np.int64)
        (filled,) = np.nonzero(np.diff(self.starts))
        for first in range(0, len(filled), 1024):  # some at a time, for views of 10^9 samples
            some = filled[first : first + 1024]
            begin, end = self.starts[some[0]], self.starts[some[-1] + 1]
            ones = np.frombuffer(self.bits[begin:end].tobytes().translate(_ONES), np.uint8)
            counts[some] = np.add.reduceat(ones, self.starts[some] - begin, dtype=np.uint32)
        return counts


@dataclass(frozen=True)
class Manifest:
    """A dataset: `samples` pairs with `captions` captions, in the tars of a finished build, or a selection of them.

    `build` identifies the input and the options that made it; `options` are those options, for people to read.
    `captions` counts those of all samples of the build or view, quarantined ones included; `bytes` is that of the tars.
    """

    directory: Folder  # of the manifest: what a user names
    build: str
    samples: int
    failures: int
    captions: int
    bytes: int
    shards: tuple[ShardInfo, ...]
    options: dict[str, Any] = field(compare=False)
    tars: Folder = field(compare=False)  # where the tars are
    indexes: Folder = field(compare=False)  # where their indexes and sidecars are
    selection: Selection | None = field(default=None, compare=False)
    prefix_keys: bool = field(
        default=False, compare=False
    )  # whether keys are unique with the tar's stem before them only

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' hashes in order and the selection: equal for two datasets exactly when their samples
        are, and stand in the same order."""
        lines = [shard.sha256 or f"{shard.name} {shard.bytes} {shard.index_sha256}" for shard in self.shards]
        if self.selection is not None:
            lines.append(hashlib.sha256(self.selection.bits).hexdigest())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards]: samples of each shard that count."""
        if self.selection is not None:
            return self.selection.counts
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    def places(self, number: int) -> np.ndarray:
        """int64: the places in the tar of shard `number` whose samples count, in order."""
        samples = self.shards[number].samples
        return np.arange(samples) if self.selection is None else np.flatnonzero(self.selection.mask(number, samples))

    def name_key(self, number: int, key: str) -> str:
        """The key in this dataset of a sample that has `key` in the tar of shard `number`."""
        return f"{self.shards[number].name.removesuffix('.tar')}_{key}" if self.prefix_keys else key

    def load_index(self, number: int) -> np.ndarray:
        """The offsets of all samples of shard `number` and its end, uint64 [samples + 1], in bytes.

        Raises ShardError for an index of another content than the manifest's.
        """
        return _parse_index(self.indexes, self.shards[number])

    def read_sidecar(
        self, number: int, columns: Sequence[str] | None = None, failures: bool = False, missing_ok: bool = False
    ) -> "pyarrow.Table":
        """The sidecar rows of shard `number`: those of samples that count, in order; with `failures`, also the build's,
        without those that a later shard has tried again.

        Raises UserError when there is no sidecar, it lacks a column (unless `missing_ok`: it is then full of nulls), or it
        is not of this tar.
        """
        import pyarrow
        import pyarrow.parquet

        shard = self.shards[number]
        name = sidecar_name(shard.name)
        folder = self.tars if self.indexes.size(name) is None else self.indexes  # others keep theirs beside the tars
        try:
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(folder.read(name)))
            there = set(file.schema_arrow.names)
            made_up = {"captions"} if "captions" not in there and "caption" in there else set()
            missing = [column for column in ("status", *(columns or ())) if column not in there | made_up]
            if missing and (not missing_ok or "status" in missing):
                raise UserError(
                    f"{folder.locate(name)}: no column '{missing[0]}'. The columns are: "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            wanted = None
            if columns is not None:
                names = ("caption" if column in made_up else column for column in ("status", *columns))
                wanted = [*dict.fromkeys(name for name in names if name in there)]
            table = file.read(columns=wanted)
            for column in missing:
                table = table.append_column(column, pyarrow.nulls(len(table)))
        except FileNotFoundError:
            if self._lies_in_quarantine(number):
                return self._empty_sidecar(columns, missing_ok)
            raise UserError(
                f"{folder.locate(name)}: no such sidecar. Make it with `python -m data_tools index --sidecars`, "
                "or restore it from a copy"
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the storage; pyarrow's own have no number
            if self._lies_in_quarantine(number):
                return self._empty_sidecar(columns, missing_ok)
            raise UserError(f"{folder.locate(name)}: not readable as parquet: {error}. Restore it") from None
        made = np.array([status == "success" for status in table.column("status").to_pylist()], dtype=bool)
        if made.sum() != shard.samples:
            if self._lies_in_quarantine(number):
                return self._empty_sidecar(columns, missing_ok)
            raise UserError(
                f"{folder.locate(name)}: tells of {made.sum()} samples, the tar holds {shard.samples}. Restore it"
            )
        keep = np.zeros(len(made), dtype=bool)
        keep[np.flatnonzero(made)[self.places(number)]] = True
        failed = ~made
        if failures and self._tried_again:
            sources = file.read(columns=["source"]).column("source").to_pylist()
            failed &= [self._tried_again.get(source, number) <= number for source in sources]
        table = table.filter(pyarrow.array(keep | failed if failures else keep))
        if made_up and (columns is None or "captions" in columns):
            captions = [None if caption is None else [caption] for caption in table.column("caption").to_pylist()]
            table = table.append_column("captions", pyarrow.array(captions, pyarrow.list_(pyarrow.string())))
        if self.prefix_keys and "key" in table.column_names:
            keys = [self.name_key(number, key) for key in table.column("key").to_pylist()]
            table = table.set_column(table.column_names.index("key"), "key", pyarrow.array(keys, pyarrow.string()))
        return table if columns is None else table.select(list(columns))

    @cached_property
    def _tried_again(self) -> dict[str, int]:
        """Where `retry` has added shards: the last one that tells of a source, by its number."""
        import pyarrow
        import pyarrow.parquet

        names, last = set(self.options.get("retried", ())), {}
        for number, shard in enumerate(self.shards):
            if shard.name in names:
                with contextlib.suppress(OSError, pyarrow.ArrowException):  # told where that shard itself is read
                    sidecar = pyarrow.BufferReader(self.indexes.read(sidecar_name(shard.name)))
                    table = pyarrow.parquet.ParquetFile(sidecar, pre_buffer=False).read(["source"], use_threads=False)
                    last |= dict.fromkeys(table.column("source").to_pylist(), number)
        return last

    def _lies_in_quarantine(self, number: int) -> bool:
        return bool(self.shards[number].samples) and self.counts[number] == 0 and self.samples > 0

    def _empty_sidecar(self, columns: Sequence[str] | None, missing_ok: bool) -> "pyarrow.Table":
        """No rows, with the columns of a shard that counts."""
        return self.read_sidecar(int(np.argmax(self.counts > 0)), columns, missing_ok=missing_ok).slice(0, 0)

    @classmethod
    def load(cls, place: str | Path | Folder) -> "Manifest":
        """Read manifest.json of a dataset or view, and check that the files beside it are the ones that it lists.

        Tars and indexes are checked by presence and size and not read, so that 100,000 shards take seconds; `load_index`
        checks an index by its hash. Raises UserError when there is no such folder, no or an unreadable manifest, another
        format, a tar that is missing, of another size or not listed, an index that is missing or of another size, not a
        single sample, or a view whose dataset has changed.
        """
        directory = open_folder(place)
        if not directory.exists():
            raise UserError(f"{directory}: no such folder. Give the folder that `python -m data_tools build` wrote")
        content = _read_manifest(directory)
        manifest = _load_view(directory, content) if "view" in content else _load_shards(directory, content)
        manifest = _leave_out_quarantined(manifest)
        if manifest.samples == 0:
            raise UserError(f"{directory}: the build holds no samples. See the error column of its .parquet files")
        return manifest

    @classmethod
    def of_shards(
        cls,
        directory: str | Path | Folder,
        shards: Sequence[ShardInfo],
        build: str = "",
        failures: int = 0,
        captions: int = 0,
        options: dict[str, Any] | None = None,
        tars: str | None = None,
    ) -> "Manifest":
        """The manifest of these shards, their samples and bytes added up; `write` it when all of them are complete.

        `tars` is where the tars are if not in `directory`, as a path from there or a URL.
        """
        samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        folder = open_folder(directory)
        parts = (folder, build, samples, failures, captions, size, tuple(shards), options or {})
        return cls(*parts, tars=_resolve(folder, tars), indexes=folder)

    def write(self) -> None:
        """Write sizes.json, checksums.json and then manifest.json into `directory`; the shards must be there already."""
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
        if self.tars != self.directory:
            content["tars"] = _relate(self.tars, self.directory)
        sizes = render_json({shard.name: shard.samples for shard in self.shards})
        manifest = render_json(content)
        small_files = {SIZES_NAME: sizes, MANIFEST_NAME: manifest}
        checksums = _hash_sidecars(self.directory, self.shards) | {
            name: hashlib.sha256(content).hexdigest() for name, content in small_files.items()
        }
        self.directory.write(SIZES_NAME, sizes)
        self.directory.write(CHECKSUMS_NAME, render_checksums(checksums))
        self.directory.write(MANIFEST_NAME, manifest)

    def write_view(
        self, out: str | Path | Folder, selection: Selection, captions: int, options: dict[str, Any]
    ) -> None:
        """Write the view `out`: those samples of this dataset (of its tars, whatever this one selects already) for which
        `selection` has a bit; they have so many `captions`."""
        folder = open_folder(out)
        folder.make()
        folder.write(SELECTION_NAME, selection.bits.tobytes())
        base = self if self.selection is None else _load_shards(self.indexes, _read_manifest(self.indexes))
        content = {
            "format": FORMAT,
            "view": {
                "of": _relate(base.directory, folder),
                "fingerprint": base.fingerprint,
                "selection_sha256": hashlib.sha256(selection.bits).hexdigest(),
            },
            "build": self.build,
            "samples": int(selection.counts.sum()),
            "failures": 0,
            "captions": captions,
            "options": options,
        }
        manifest = render_json(content)
        folder.write(CHECKSUMS_NAME, render_checksums({MANIFEST_NAME: hashlib.sha256(manifest).hexdigest()}))
        folder.write(MANIFEST_NAME, manifest)


def render_checksums(files: Mapping[str, str]) -> bytes:
    """The content of checksums.json: SHA-256 by file name, and one over all that, so that its own damage is known."""
    listed = dict(sorted(files.items()))
    return render_json({"files": listed, "sha256": hashlib.sha256(render_json(listed)).hexdigest()})


def _hash_sidecars(folder: Folder, shards: Sequence[ShardInfo]) -> dict[str, str]:
    """SHA-256 of the sidecars and statistics that are there, and of build.json.

    A sidecar is only read where the statistics beside it do not give its hash, as those of our own commands do.
    """
    names, hashes = set(folder.names()), {}
    for shard in shards:
        sidecar, statistics = sidecar_name(shard.name), statistics_name(shard.name)
        known = None
        if statistics in names:
            content = folder.read(statistics)
            hashes[statistics] = hashlib.sha256(content).hexdigest()
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known = json.loads(content)["sidecar_sha256"]
        if sidecar in names:
            hashes[sidecar] = known or hashlib.sha256(folder.read(sidecar)).hexdigest()
    if STATE_NAME in names:
        hashes[STATE_NAME] = hashlib.sha256(folder.read(STATE_NAME)).hexdigest()
    return hashes


def _relate(target: Folder, start: Folder) -> str:
    """`target` as seen from `start`: relative between local folders, so that both can be moved together."""
    if type(target) is Folder and type(start) is Folder:
        return os.path.relpath(target.path.resolve(), start.path.resolve())
    return str(target)


def _resolve(start: Folder, place: str | None) -> Folder:
    """The folder that `_relate` has named."""
    return start if place is None else start.resolve(place)


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in its shard: `fields` maps an extension ("jpg", "txt", "json") to the member's bytes."""

    key: str
    shard: str
    fields: dict[str, bytes]
    origin: tuple[int, int] | None = None  # where it was read: number of the shard, place in its tar; None of a stream


class ShardReader:
    """Random access to a dataset: sample i is the i-th that counts, in the order of the manifest's shards.

    Safe to share between threads: reads are positional, and a shard that leaves the cache is closed only when no thread
    reads from it any more. At most `max_open_shards` files are kept open.
    """

    def __init__(self, manifest: Manifest, max_open_shards: int = 512) -> None:
        self._manifest = manifest
        self._ends = np.cumsum(manifest.counts)
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
        return self.read_selected(*self.locate(index))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard of sample `index`, and how many samples that count come before it there.

        Raises IndexError outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - (self._ends[number - 1] if number else 0))

    def read_place(self, number: int, place: int) -> RawSample:
        """Read the sample at a place of the tar of shard `number`, whether it counts or not. Raises ShardError."""
        return self._read(number, _OpenShard.read, place)

    def read_selected(self, number: int, place: int) -> RawSample:
        """Read the sample of shard `number` before which so many come that count. Raises ShardError."""
        return self._read(number, _OpenShard.read_selected, place)

    fetches = False  # whether `prefetch` does anything

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Say which shards will be read from now on, in the order of need. Readers of remote ones fetch them ahead."""

    def close(self) -> None:
        """Close the cached files; a later `read` opens them again."""
        with self._lock:
            self._open_shards.clear()

    def _read(self, number: int, read: Callable[["_OpenShard", int], RawSample], place: int) -> RawSample:
        try:
            return read(self._open(number), place)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and error.errno not in _LOST:
                raise
            with self._lock:
                self._open_shards.pop(number, None)  # a stale handle never reads again, a new one may
            where = self._manifest.tars.locate(self._manifest.shards[number].name)
            raise ShardError(f"{where}: this shard, or its index, is not readable: {error}. Restore it") from None

    def _open(self, number: int) -> "_OpenShard":
        with self._lock:
            if number in self._open_shards:
                self._open_shards.move_to_end(number)
                return self._open_shards[number]
        # Opened outside the lock, so that a slow file system stops one thread and not all; the first to come back wins.
        return self._keep(number, self._open_shard(number, self._open_file))

    def _keep(self, number: int, opened: "_OpenShard") -> "_OpenShard":
        with self._lock:
            shard = self._open_shards.setdefault(number, opened)
            if len(self._open_shards) > self._max_open_shards:
                self._open_shards.popitem(last=False)
            return shard

    def _open_shard(self, number: int, open_file: Callable[[int], Any]) -> "_OpenShard":
        return _OpenShard(self._manifest, number, open_file(number))

    def _open_file(self, number: int) -> Any:
        """What reads ranges of the tar of shard `number`: `read(start, end)`."""
        return self._manifest.tars.open_ranges(self._manifest.shards[number].name)


class _OpenShard:
    """An open tar with its index and its part of the selection."""

    def __init__(self, manifest: Manifest, number: int, file: Any) -> None:
        self._info, self._number = manifest.shards[number], number
        self._name_key = partial(manifest.name_key, number)
        self._path = manifest.tars.locate(self._info.name)
        self._offsets = manifest.load_index(number)
        self._places = None if manifest.selection is None else manifest.places(number)
        self._file = file

    def read_selected(self, place: int) -> RawSample:
        return self.read(place if self._places is None else int(self._places[place]))

    def read(self, place: int) -> RawSample:
        start, end = int(self._offsets[place]), int(self._offsets[place + 1])
        data = self._file.read(start, end)
        if len(data) < end - start:
            raise self._describe(place, f": the file ends after {len(data)} of {end - start} bytes")
        try:
            members = parse_members(data)
        except TarError as error:
            raise self._describe(place, f": at byte {start + error.offset} {error.text}") from None
        fields, keys = {}, set()
        for name, content in members.items():
            if is_sample_file(name):
                key, extension = split_name(name)
                fields[extension] = content
                keys.add(key)
        if len(keys) != 1:
            raise self._describe(place, f": found the members of {len(keys)} keys, valid is one")
        return RawSample(self._name_key(keys.pop()), self._info.name, fields, (self._number, place))

    def _describe(self, place: int, problem: str) -> ShardError:
        where = f"sample {place} of {self._info.samples}, bytes {self._offsets[place]} to {self._offsets[place + 1]}"
        advice = f"Restore {self._info.name} from a copy, or delete {MANIFEST_NAME} and this shard and build again"
        return ShardError(f"{self._path}: {where}{problem}. {advice}")


class ShardWriter:
    """Appends samples to a tar, in constant memory. Made by `write_shard`; after its block `info` is set."""

    info: ShardInfo

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets = [0]
        self._hash = hashlib.sha256()
        self._written = self._sent = 0

    def add(self, key: str, fields: Mapping[str, bytes]) -> tuple[int, int]:
        """Append a sample, members KEY.EXTENSION in the order of `fields`; return its offset and its size in bytes."""
        if not _KEY.fullmatch(key) or not all(_EXTENSION.fullmatch(extension) for extension in fields):
            raise ValueError(f"{key!r} with {list(fields)}: keys have ASCII letters, digits, '_' and '-', but no dot")
        parts: list[bytes] = []
        for extension, data in fields.items():
            parts += (render_header(f"{key}.{extension}", len(data)), data, bytes(-len(data) % BLOCK_BYTES))
        offset, size = self._offsets[-1], self._write(b"".join(parts))
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
        self._written += len(data)
        if self._written - self._sent >= _SENT_AT_ONCE and hasattr(os, "posix_fadvise"):
            # The system begins to write these pages to the disk, so that there is little to wait for at the end. (It
            # forgets the pages that it has written before, which here are none.)
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._written
        return len(data)


@contextlib.contextmanager
def write_shard(folder: str | Path | Folder, name: str) -> Iterator[ShardWriter]:
    """Write one tar and its index; they appear under their names, complete, when the block ends without an error."""
    if not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"{name}: a shard's name has letters, digits, '_' and '-', and ends in .tar")
    folder = open_folder(folder)
    with folder.create(name) as file:
        writer = ShardWriter(file)
        yield writer
        index = writer._finish(name)
    folder.write(name + INDEX_SUFFIX, index)


def sidecar_name(shard: str) -> str:
    """00000.tar -> 00000.parquet."""
    return shard.removesuffix(".tar") + ".parquet"


def statistics_name(shard: str) -> str:
    """00000.tar -> 00000_stats.json."""
    return shard.removesuffix(".tar") + "_stats.json"


def find_captions(fields: Mapping[str, bytes]) -> list[str]:
    """All captions of a sample: `captions` (or `caption`) of its .json, else its .txt. Raises ValueError for what is
    no text."""
    try:
        content = json.loads(fields["json"]) if "json" in fields else None
    except RecursionError:
        raise ValueError("its json is nested too deeply") from None
    captions = None
    if isinstance(content, dict):
        captions = content.get("captions")
        if captions is None and isinstance(content.get("caption"), str):
            captions = [content["caption"]]
    if captions is None and "txt" in fields:
        captions = [fields["txt"].decode("utf-8")]
    if not isinstance(captions or [], list) or not all(isinstance(caption, str) for caption in captions or []):
        raise ValueError("`captions` in its json is not a list of texts")
    return [caption for caption in captions or [] if caption.strip()]


def _parse_index(folder: Folder, shard: ShardInfo) -> np.ndarray:
    """The shard's sample offsets and its end offset, uint64 [samples + 1], in bytes.

    Raises ShardError when they do not rise to a place inside the tar, or are not those that the manifest lists.
    """
    where, content = folder.locate(shard.name + INDEX_SUFFIX), folder.read(shard.name + INDEX_SUFFIX)
    offsets = np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8")
    rising = len(offsets) == shard.samples + 1 and bool((offsets[1:] > offsets[:-1]).all())
    if not rising or int(offsets[-1]) > shard.bytes:
        raise ShardError(f"{where}: these are not the offsets of {shard.samples} samples. Restore it from a copy")
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise ShardError(f"{where}: not the index that the manifest lists. {_ADVICE}")
    return offsets


def _read_manifest(folder: Folder) -> dict[str, Any]:
    where = folder.locate(MANIFEST_NAME)
    try:
        content = json.loads(folder.read(MANIFEST_NAME))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {MANIFEST_NAME}: is it a finished build? Run `python -m data_tools build ...` into it "
            "again to finish it, or `python -m data_tools index` for tars of others"
        ) from None
    except ValueError:
        raise UserError(
            f"{where}: not readable as JSON. Restore it from a copy, or delete it and build again"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{where}: format {found!r}. This version reads format {FORMAT}: update it, or build again")
    return content


def _load_shards(folder: Folder, content: dict[str, Any]) -> Manifest:
    """The dataset of a manifest that lists shards, its files checked."""
    try:
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        names = {key: content[key] for key in ("build", "samples", "failures", "captions", "bytes", "options")}
        tars = _resolve(folder, content.get("tars"))
        foreign = names["options"].get("command") == "index"
        prefix_keys = bool(names["options"].get("prefix_keys", False))
        parts = {"directory": folder, "indexes": folder, "tars": tars, "prefix_keys": prefix_keys}
        manifest = Manifest(shards=shards, **parts, **names)
        consistent = manifest.samples == sum(shard.samples for shard in shards)
        consistent &= all(_SHARD_NAME.fullmatch(shard.name) or foreign for shard in shards)
        consistent &= not any("/" in shard.name or not shard.name.endswith(".tar") for shard in shards)
    except (KeyError, TypeError, AttributeError):
        consistent = False
    if not consistent:
        where = folder.locate(MANIFEST_NAME)
        raise UserError(
            f"{where}: entries are missing or contradict each other. Restore it from a copy, or build again"
        )
    endings = (".tar", INDEX_SUFFIX, RETRY_NAME)
    sizes = tars.sizes(endings)
    indexes = sizes if tars == folder else folder.sizes(endings)
    unlisted = {name for name in sizes if name.endswith(".tar")} - {shard.name for shard in shards}
    if unlisted and tars == folder:
        unlisted -= set(json.loads(folder.read(RETRY_NAME))["shards"]) if RETRY_NAME in sizes else set()
        if unlisted:
            raise UserError(
                f"{folder}: holds tars that {MANIFEST_NAME} does not list (such as {min(unlisted)}, "
                f"{len(unlisted)} in all). They belong to another build: move them elsewhere"
            )
    quarantine = read_quarantine(folder)
    for shard in shards:
        if not shard.samples or len(quarantine.get(shard.name, ())) < shard.samples:
            _check_sizes(manifest, shard, sizes, indexes)
    return manifest


def check_shard_files(
    manifest: Manifest, shard: ShardInfo, sizes: Mapping[str, int], indexes: Mapping[str, int]
) -> None:
    """Raise UserError unless the shard's tar has its size and its index its hash. The tar is not read.

    `sizes` and `indexes` are the sizes of the files in the folders of the tars and of the indexes.
    """
    _check_sizes(manifest, shard, sizes, indexes)
    _parse_index(manifest.indexes, shard)


def _check_sizes(manifest: Manifest, shard: ShardInfo, sizes: Mapping[str, int], indexes: Mapping[str, int]) -> None:
    """Raise UserError unless the shard's tar and its index are there, of their sizes."""
    size, name = sizes.get(shard.name), shard.name + INDEX_SUFFIX
    if size is None:
        raise UserError(f"{manifest.tars.locate(shard.name)}: this shard is missing. {_ADVICE}")
    if size != shard.bytes:
        where = manifest.tars.locate(shard.name)
        raise UserError(f"{where}: {size} bytes, the manifest says {shard.bytes}. {_ADVICE}")
    if name not in indexes:
        raise UserError(f"{manifest.indexes.locate(name)}: this index is missing. {_ADVICE}")
    if indexes[name] != 8 * (shard.samples + 1):
        raise UserError(f"{manifest.indexes.locate(name)}: not the index that the manifest lists. {_ADVICE}")


def _load_view(folder: Folder, content: dict[str, Any]) -> Manifest:
    where = folder.locate(MANIFEST_NAME)
    try:
        view = content["view"]
        base = _resolve(folder, view["of"])
        wanted = view["fingerprint"]
        names = {key: content[key] for key in ("build", "samples", "failures", "captions", "options")}
    except (KeyError, TypeError):
        raise UserError(f"{where}: entries of the view are missing. Make the view again") from None
    if not base.exists():
        raise UserError(f"{where}: a view of {base}, which is not there. Put it back, or make the view again")
    source = _load_shards(base, _read_manifest(base))
    if source.fingerprint != wanted:
        raise UserError(f"{where}: {base} is not the dataset that this view was made of. Make the view again")
    bits = np.frombuffer(folder.read(SELECTION_NAME), dtype=np.uint8)
    starts = np.cumsum([0, *((shard.samples + 7) // 8 for shard in source.shards)], dtype=np.int64)
    selection = Selection(bits, starts)
    if hashlib.sha256(bits).hexdigest() != view["selection_sha256"] or len(bits) != starts[-1]:
        raise UserError(f"{folder.locate(SELECTION_NAME)}: not the selection that the view lists. Make the view again")
    parts = {"shards": source.shards, "bytes": source.bytes, "tars": source.tars, "indexes": source.indexes}
    return Manifest(directory=folder, selection=selection, prefix_keys=source.prefix_keys, **parts, **names)


def read_quarantine(folder: Folder) -> dict[str, dict[int, str]]:
    """What quarantine.json says: for each shard, the places in its tar whose samples do not count, and why.

    Raises UserError when it is not readable.
    """
    try:
        entries = json.loads(folder.read(QUARANTINE_NAME))
        return {name: {int(place): str(why) for place, why in places.items()} for name, places in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"{folder.locate(QUARANTINE_NAME)}: not readable. Remove it, and run `python -m data_tools verify "
            "--quarantine` again"
        ) from None


def _leave_out_quarantined(manifest: Manifest) -> Manifest:
    """The dataset without the samples that quarantine.json of its tars' manifest names."""
    entries = read_quarantine(manifest.indexes)
    if not entries:
        return manifest
    taken = {}
    for number, shard in enumerate(manifest.shards):
        if shard.name in entries:
            places = [place for place in entries[shard.name] if 0 <= place < shard.samples]
            taken[number] = np.array(places, dtype=np.int64)
    selection = (manifest.selection or Selection.of_all(manifest.counts)).without(taken)
    return replace(manifest, selection=selection, samples=int(selection.counts.sum()))
