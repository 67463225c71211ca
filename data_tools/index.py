"""Makes a dataset of tars that others wrote: reads their headers, writes indexes and a manifest beside them or elsewhere.

An index is what NVIDIA Energon writes: the offset of the first header of each sample (an extension header before it
included), then the offset of the archive's end. Members are grouped as webdataset does it: neighbours of one key, the
key being the name up to the first dot after the last slash; `__meta__` files and names without a dot are of no sample.
"""

import contextlib
import glob
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from data_tools.files import Folder, RemoteFolder, format_bytes, is_url, open_folder
from data_tools.folder import identify, list_sidecar_fields, write_sidecar
from data_tools.shards import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    PICTURE_EXTENSIONS,
    Manifest,
    ShardError,
    ShardInfo,
    ShardReader,
    find_captions,
    sidecar_name,
)
from data_tools.tar import BLOCK_BYTES, Member, TarError, is_sample_file, split_name, walk_members
from data_tools.workers import Report, choose_processes, open_progress_bar, run_tasks

_REMOTE_WINDOW_BYTES = 4 * 2**20
_HASH_CHUNK_BYTES = 4 * 2**20
_EXTENSION_BLOCKS = 3
"""Extension headers are looked for with so many blocks of data: longer ones hold a name of a thousand letters."""


@dataclass(frozen=True)
class _Task:
    """One tar to index."""

    tars: Folder
    out: Folder
    name: str
    size: int
    prefix_keys: bool
    hashed: bool
    sidecars: bool


@dataclass(frozen=True)
class _Result:
    info: ShardInfo
    captions: int
    hashes: bytes  # of the keys, uint64 each
    repeated: int  # samples with two members of one extension
    reused: bool


def index_tars(
    tars: Sequence[str],
    out: str | None = None,
    *,
    prefix_keys: bool = False,
    sidecars: bool = False,
    hash: bool = False,
    processes: int | None = None,
    as_json: bool = False,
) -> Manifest:
    """Index the tars that `tars` name: paths, URLs, folders, patterns with `*` and `{00000..00099}`; one folder of them.

    Writes TAR.idx, sizes.json and manifest.json beside the tars, or into `out`. The tars are not changed, and only
    their headers are read, unless they are to be hashed or to get `sidecars`. An index that is there and fits its tar is
    taken as it is. With `prefix_keys` the keys of the dataset are the tars' with the tar's name before them.

    Raises UserError for a tar that is damaged or holds links, tars of several folders, and a folder with more of them.
    """
    folder, names = find_tars(tars)
    target = folder if out is None else open_folder(out)
    manifest, facts = index_folder(
        folder, names, target, prefix_keys=prefix_keys, sidecars=sidecars, hash=hash, processes=processes
    )
    _print(facts, manifest, as_json)
    return manifest


def index_folder(
    folder: Folder,
    names: Sequence[str],
    target: Folder,
    *,
    prefix_keys: bool | None = False,
    sidecars: bool = False,
    hash: bool = False,
    processes: int | None = None,
) -> tuple[Manifest, dict[str, Any]]:
    """Index these tars of a folder into `target`; return the dataset, and what was found, for people to read.

    `prefix_keys` None: where two samples have one key. Raises UserError as `index_tars`.
    """
    processes = choose_processes(processes)
    target.make()
    with target.lock():
        _check_target(target, folder, names)
        sizes = folder.sizes()
        measured = [sizes[name] if name in sizes else folder.size(name) for name in names]
        tasks = [
            _Task(folder, target, name, size, bool(prefix_keys), hash, sidecars)
            for name, size in zip(names, measured, strict=True)
        ]
        results: list[Any] = [None] * len(tasks)
        with open_progress_bar(len(tasks), "tar") as report:
            with closing(run_tasks(_index_tar, tasks, processes, report)) as done:
                for number, result in done:
                    results[number] = result
        manifest = _make_manifest(folder, target, results, bool(prefix_keys))
        if manifest.samples == 0:
            raise UserError(f"{folder}: not one sample in {len(names)} tars: no member has a name such as KEY.jpg")
        duplicates, example = _count_duplicates(manifest, results)
        if duplicates and prefix_keys is None:
            manifest = _make_manifest(folder, target, results, prefix_keys=True)
        manifest.write()
    facts = {
        "directory": str(target),
        "tars": len(names),
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "reused_indexes": sum(result.reused for result in results),
        "duplicate_keys": duplicates,
        "duplicate_key": example,
        "repeated_members": sum(result.repeated for result in results),
    }
    return Manifest.load(target), facts


def _make_manifest(folder: Folder, target: Folder, results: Sequence[_Result], prefix_keys: bool) -> Manifest:
    options = {"command": "index", "prefix_keys": prefix_keys}
    build = identify({**options, "tars": {result.info.name: result.info.index_sha256 for result in results}})
    return replace(
        Manifest.of_shards(
            target,
            [result.info for result in results],
            build,
            captions=sum(result.captions for result in results),
            options=options,
            tars=_name_tars(folder, target),
        ),
        prefix_keys=prefix_keys,
    )


def find_tars(patterns: Sequence[str], opener: Callable[[str], Folder] = open_folder) -> tuple[Folder, list[str]]:
    """The folder of the tars that the patterns name, and their names in order, each once. Raises UserError.

    `opener` makes the folder of a path or URL.
    """
    import braceexpand

    found: dict[tuple[Folder, str], None] = {}
    listed: dict[Folder, set[str]] = {}
    for pattern in patterns:
        try:
            places = list(braceexpand.braceexpand(pattern))
        except braceexpand.UnbalancedBracesError:
            raise UserError(f"{pattern}: its braces do not match. Write ranges as {{00000..00099}}") from None
        for place in places:
            for folder, name in _list_tars(place, opener, listed):
                found[folder, name] = None
    folders = list(dict.fromkeys(folder for folder, _ in found))
    if len(folders) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]}: tars of several folders. Index each folder alone, and join the datasets "
            "with `python -m data_tools reshard`"
        )
    return folders[0], [name for _, name in found]


def _list_tars(place: str, opener: Callable[[str], Folder], listed: dict[Folder, set[str]]) -> list[tuple[Folder, str]]:
    """The tars at one path or URL, which may have wildcards or be a folder.

    `listed` keeps the names in the folders of a call: asking a store for each of a thousand tars would take minutes.
    """
    if any(letter in place for letter in "*?["):
        if is_url(place):
            root = RemoteFolder(place)
            paths = [root._fs.unstrip_protocol(path) for path in root._fs.glob(root._root)]
        else:
            paths = glob.glob(place)
        tars = sorted(path for path in paths if path.endswith(".tar"))
        if not tars:
            raise UserError(f"{place}: no tar of such a name")
        return [_split_place(path, opener) for path in tars]
    if place.endswith(".tar"):
        folder, name = _split_place(place, opener)
        if folder not in listed:
            listed[folder] = set(folder.sizes())
        if name not in listed[folder] and folder.size(name) is None:
            raise UserError(
                f"{place}: no such tar. Give tars, patterns such as 'shards/{{00000..00099}}.tar', or a folder"
            )
        return [(folder, name)]
    folder = opener(place)
    if not folder.exists():
        raise UserError(f"{place}: no such folder or tar. Give tars (NAME.tar), patterns, or a folder of tars")
    tars = [(folder, name) for name in sorted(folder.sizes()) if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{place}: no tars are in this folder. They end in .tar (compressed ones cannot be indexed)")
    return tars


def _split_place(place: str, opener: Callable[[str], Folder]) -> tuple[Folder, str]:
    if is_url(place):
        folder, _, name = place.rpartition("/")
        return opener(folder), name
    return opener(str(Path(place).parent)), Path(place).name


def _name_tars(tars: Folder, out: Folder) -> str | None:
    """The folder of the tars for `Manifest.of_shards`, which takes a relative path to begin at the manifest."""
    if tars == out:
        return None
    return str(tars) if isinstance(tars, RemoteFolder) else str(tars.path.resolve())


def _check_target(target: Folder, folder: Folder, names: Sequence[str]) -> None:
    """Refuse a folder that another command has made, and one where readers would find tars that are not indexed."""
    there = set(target.names())
    if MANIFEST_NAME in there:
        try:
            content = json.loads(target.read(MANIFEST_NAME))
            command = content["options"].get("command", "build")
        except (ValueError, KeyError, TypeError, AttributeError):
            command = "another program"
        if command != "index":
            raise UserError(
                f"{target}: its {MANIFEST_NAME} is of {command}, not of `index`: it is a dataset already, or give --out"
            )
    if target == folder:
        others = sorted(name for name in there - set(names) if name.endswith(".tar"))
        if others:
            raise UserError(
                f"{folder}: holds {len(others)} more tars (such as {others[0]}). Index all of the folder, or give --out "
                "with a folder of its own for these"
            )
    elif any(name.endswith(".tar") for name in there):
        raise UserError(f"{target}: holds tars itself. Give a folder of its own for the indexes as --out")


# One tar


def _index_tar(task: _Task, report: Report) -> _Result:
    where = task.tars.locate(task.name)
    file = task.tars.open_ranges(task.name)
    read = _Window(file, task.size).read if isinstance(task.tars, RemoteFolder) else file.read
    try:
        known = _reuse_index(task, read)
        if known is None:
            offsets, keys, repeated = _scan(read, task.size)
        else:
            offsets, keys = known
            repeated = 0
    except TarError as error:
        raise UserError(
            f"{where}: at byte {error.offset} {error.text}. Restore the tar from a copy, or leave it out"
        ) from None
    if offsets[-1] > task.size:
        raise UserError(f"{where}: the archive ends at byte {task.size}, in the padding of its last member. Restore it")
    index = np.asarray(offsets, dtype="<u8").tobytes()
    if known is None:
        task.out.write(task.name + INDEX_SUFFIX, index)
    digest = _hash_tar(file.read, task.size) if task.hashed else ""
    info = ShardInfo(task.name, len(keys), task.size, digest, hashlib.sha256(index).hexdigest())
    captions = _make_sidecar(task, info, keys) if task.sidecars else len(keys)
    stem = task.name.removesuffix(".tar")
    hashes = hash_keys(f"{stem}_{key}" if task.prefix_keys else key for key in keys)
    report(1, size=0)
    return _Result(info, captions, hashes.tobytes(), repeated, known is not None)


class _Window:
    """Ranged reads of a remote tar, several headers by one request."""

    def __init__(self, file: Any, total: int) -> None:
        self._file, self._total = file, total
        self._start, self._data = 0, b""

    def read(self, start: int, end: int) -> bytes:
        end = min(end, self._total)
        if not self._start <= start <= end <= self._start + len(self._data):
            until = min(max(end, start + _REMOTE_WINDOW_BYTES), self._total)
            self._start, self._data = start, self._file.read(start, until) if until > start else b""
        return self._data[start - self._start : end - self._start]


def _scan(read: Any, total: int) -> tuple[list[int], list[str], int]:
    """Offsets of the samples and of the end; their keys; how many samples name one extension twice. Raises TarError."""
    offsets: list[int] = []
    keys: list[str] = []
    repeated: set[int] = set()
    extensions: set[str] = set()
    members = walk_members(read, total)
    while True:
        try:
            member: Member = next(members)
        except StopIteration as stop:
            offsets.append(stop.value)
            return offsets, keys, len(repeated)
        if not is_sample_file(member.name):
            continue
        key, extension = split_name(member.name)
        if not keys or key != keys[-1]:
            offsets.append(member.offset)
            keys.append(key)
            extensions = set()
        if extension in extensions:
            repeated.add(len(keys))
        extensions.add(extension)


def _reuse_index(task: _Task, read: Any) -> tuple[list[int], list[str]] | None:
    """Offsets and keys of an index that is there and fits the tar, else None.

    It fits when it is not older than the tar, a member of another key begins at each offset, and the archive ends at the
    last one.
    """
    name = task.name + INDEX_SUFFIX
    folder = task.out if task.out.size(name) is not None else task.tars
    if folder.size(name) is None or _is_older(folder, name, task):
        return None
    content = folder.read(name)
    if len(content) % 8 or not content:
        return None
    offsets = [int(offset) for offset in np.frombuffer(content, "<u8")]
    rising = all(one < other for one, other in zip(offsets, offsets[1:], strict=False))
    if not rising or offsets[-1] > task.size:
        return None
    end = read(offsets[-1], min(offsets[-1] + BLOCK_BYTES, task.size)) if offsets[-1] < task.size else b""
    if end.strip(b"\0"):
        return None
    keys: list[str] = []
    try:
        for start, stop in zip(offsets, offsets[1:], strict=False):
            key = _read_key(read, start, stop)
            if key is None or (keys and key == keys[-1]) or _follows_extension(read, start):
                return None
            keys.append(key)
    except TarError:
        return None
    if folder != task.out:
        task.out.write(name, content)
    return offsets, keys


def _follows_extension(read: Any, start: int) -> bool:
    """Whether an extension header ends at `start`, so that its member begins before."""
    for data_blocks in range(1, _EXTENSION_BLOCKS + 1):
        position = start - (1 + data_blocks) * BLOCK_BYTES
        if position < 0:
            return False
        header = read(position, position + BLOCK_BYTES)
        if header[257:262] == b"ustar" and header[156:157] in (b"x", b"L"):
            with contextlib.suppress(ValueError):
                size = int(header[124:136].strip(b" \0"), 8)
                if -(-size // BLOCK_BYTES) == data_blocks:
                    return True
    return False


def _is_older(folder: Folder, name: str, task: _Task) -> bool:
    if isinstance(folder, RemoteFolder) or isinstance(task.tars, RemoteFolder):
        return False  # stores do not tell alike; what follows reads a header of every sample
    index, tar = Path(folder.locate(name)), Path(task.tars.locate(task.name))
    return index.stat().st_mtime_ns < tar.stat().st_mtime_ns


def _read_key(read: Any, start: int, stop: int) -> str | None:
    """The key of the sample whose first header begins at `start`; None where no file of a sample begins there."""
    for member in walk_members(lambda one, other: read(start + one, start + other), stop - start, is_part=True):
        starts_here = member.offset == 0 and is_sample_file(member.name)
        return split_name(member.name)[0] if starts_here else None
    return None


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """uint64: 64 bits of a hash for each key. Two of a billion keys agree by chance in one case of 37."""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _hash_tar(read: Any, total: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, total, _HASH_CHUNK_BYTES):
        digest.update(read(start, min(start + _HASH_CHUNK_BYTES, total)))
    return digest.hexdigest()


# Sidecars


def _make_sidecar(task: _Task, info: ShardInfo, keys: Sequence[str]) -> int:
    """Write the sidecar of a tar that has none, and return the number of captions."""
    import pyarrow

    manifest = Manifest.of_shards(task.out, [info], tars=_name_tars(task.tars, task.out))
    name = sidecar_name(task.name)
    if task.out.size(name) is not None or task.tars.size(name) is not None:
        if manifest.read_sidecar(0, ["key"]).column("key").to_pylist() != list(keys):
            where = task.tars.locate(name)
            raise UserError(f"{where}: its keys are not those of {task.name}. Move it elsewhere to have another made")
        with contextlib.suppress(UserError):  # a sidecar of others need not have captions
            captions = manifest.read_sidecar(0, ["captions"]).column("captions").to_pylist()
            return sum(len(part or ()) for part in captions)
        return info.samples
    reader, offsets, rows = ShardReader(manifest), manifest.load_index(0), []
    for place, key in enumerate(keys):
        start, end = int(offsets[place]), int(offsets[place + 1])
        row = {"key": key, "status": "success", "offset": start, "size": end - start}
        try:
            rows.append(row | describe_sample(reader.read_place(0, place).fields))
        except ShardError as error:
            rows.append(row | {"captions": [], "error": f"unreadable sample: {error}"})
    write_sidecar(task.out, task.name, rows, pyarrow.schema(list_sidecar_fields()))
    return sum(len(row["captions"]) for row in rows)


def describe_sample(fields: Mapping[str, bytes]) -> dict[str, Any]:
    """What a sidecar says of a sample, out of its bytes; the picture's header is read, the picture not decoded.

    `error` tells what is not as it should be, of a sample that there is nevertheless.
    """
    errors = []
    try:
        captions = find_captions(fields)
        if not captions:
            errors.append("no caption")
    except ValueError as error:
        captions = []
        errors.append(f"unreadable caption: {error}")
    row: dict[str, Any] = {"caption": captions[0] if captions else None, "captions": captions}
    picture = next((fields[extension] for extension in PICTURE_EXTENSIONS if extension in fields), None)
    if picture is None:
        errors.append(f"no picture: its files are {', '.join(fields)}")
    else:
        row["sha256"] = hashlib.sha256(picture).hexdigest()
        try:
            row["width"], row["height"] = read_picture_size(picture)
        except ValueError as error:
            errors.append(f"not a picture: {error}")
    content = _read_json_object(fields)
    for name, fallback in (("original_width", "width"), ("original_height", "height")):
        value = content.get(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        row[name] = value if is_size else row.get(fallback)
    source = content.get("source", content.get("url"))
    row["source"] = source if isinstance(source, str) else None
    row["error"] = "; ".join(errors) or None
    return row


def read_picture_size(data: bytes) -> tuple[int, int]:
    """Width and height out of the header, in pixels. Raises ValueError."""
    from PIL import Image

    from data_tools.image import FORMATS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS).size
    except MemoryError:
        raise
    except Exception as error:
        # Pillow answers to damaged headers with almost any exception; its text names the buffer's address.
        raise ValueError(type(error).__name__) from None


def _read_json_object(fields: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        content = json.loads(fields.get("json", b"null"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# What came of it


def _count_duplicates(manifest: Manifest, results: Sequence[_Result]) -> tuple[int, str | None]:
    """How many samples have the key of an earlier one, and such a key."""
    hashes = np.concatenate([np.frombuffer(result.hashes, "<u8") for result in results])
    order = np.argsort(hashes, kind="stable")
    again = hashes[order][1:] == hashes[order][:-1]
    if not again.any():
        return 0, None
    index = int(order[1:][again].min())
    ends = np.cumsum([result.info.samples for result in results])
    number = int(np.searchsorted(ends, index, side="right"))
    place = int(index - (ends[number - 1] if number else 0))
    offsets = manifest.load_index(number)
    read = manifest.tars.open_ranges(manifest.shards[number].name).read
    key = _read_key(read, int(offsets[place]), int(offsets[place + 1]))
    return int(again.sum()), manifest.name_key(number, key or "")


def _print(facts: Mapping[str, Any], manifest: Manifest, as_json: bool) -> None:
    if facts["duplicate_keys"]:
        hint = "" if manifest.prefix_keys else ". Readers that ask for unique keys need --prefix-keys"
        text = f"{facts['duplicate_keys']} samples have the key of another (such as {facts['duplicate_key']})"
        print(f"warning: {manifest.directory}: {text}{hint}", file=sys.stderr)
    if facts["repeated_members"]:
        text = f"{facts['repeated_members']} samples have two files of one extension, which no reader accepts"
        print(f"warning: {manifest.directory}: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    reused = f", {facts['reused_indexes']} indexes were there" if facts["reused_indexes"] else ""
    size = format_bytes(manifest.bytes)
    print(f"{manifest.directory}: {manifest.samples} samples, {size} in {facts['tars']} tars{reused}")
