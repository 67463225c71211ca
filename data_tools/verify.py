"""Checks a dataset byte by byte, and says in which shard and sample a damage lies.

Every file is covered by a hash: a tar and its index by those of the manifest, the rest by checksums.json, which covers
itself. Where a tar is not what it was, each of its samples is held against its own headers, its sidecar's row and what
our writer would have written, so that one flipped bit has a name. What is verified may be broken in any way: nothing
here goes through `Manifest.load`, which refuses such datasets.
"""

import hashlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from data_tools.files import Folder, format_bytes, open_folder, render_json
from data_tools.index import read_picture_size
from data_tools.shards import (
    CHECKSUMS_NAME,
    FORMAT,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    PICTURE_EXTENSIONS,
    QUARANTINE_NAME,
    RETRY_NAME,
    SELECTION_NAME,
    SIZES_NAME,
    STATE_NAME,
    Manifest,
    ShardInfo,
    read_quarantine,
    sidecar_name,
    statistics_name,
)
from data_tools.tar import ARCHIVE_END, BLOCK_BYTES, TarError, is_sample_file, render_member, split_name, walk_members
from data_tools.workers import Report, choose_processes, open_progress_bar, run_tasks

_CHUNK_BYTES = 4 * 2**20
_PROBLEMS_SHOWN = 100
_IN_JSON = ("key", "captions", "source", "width", "height", "original_width", "original_height", "sha256")
_OF_THE_TAR = ("tar", "index")
"""Kinds of problems for which the samples of a shard cannot be used, as those of its sidecar and statistics can."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which file, and in which sample if it lies in one."""

    file: str
    text: str
    shard: str | None = None
    place: int | None = None
    key: str | None = None
    kind: str = ""  # "tar" and "index": of all samples of the shard; "sample"; else of none

    def __str__(self) -> str:
        sample = "" if self.place is None else f" sample {self.place} {self.key or '(of no readable key)'}:"
        return f"{self.file}:{sample} {self.text}"


@dataclass(frozen=True)
class Verdict:
    """What `verify_dataset` has found."""

    directory: str
    shards: int
    samples: int
    bytes: int
    quarantined: int
    problems: tuple[Problem, ...]
    newly_quarantined: int = 0
    has_checksums: bool = True

    def __bool__(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Task:
    """One shard to check."""

    tars: Folder
    indexes: Folder
    info: ShardInfo
    tar_size: int | None
    names: frozenset[str]  # of its files that are there, or that checksums.json lists
    hashes: Mapping[str, str]  # by checksums.json
    foreign: bool
    wanted: frozenset[str]  # which of its files a dataset like this one has
    quarantined: frozenset[int]
    decode: bool


@dataclass
class _Findings:
    """Problems of one shard, in the making."""

    task: _Task
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, text: str, kind: str = "", place: int | None = None, key: str | None = None) -> None:
        self.problems.append(Problem(file, text, self.task.info.name, place, key, kind))


def verify_dataset(
    directory: str | Path,
    decode: bool = False,
    quarantine: bool = False,
    processes: int | None = None,
    as_json: bool = False,
) -> Verdict:
    """Check all files of a dataset or view; print and return what is wrong. The verdict is true when nothing is.

    With `decode` every picture is decoded wholly. With `quarantine` the samples that are damaged, and all of shards
    that are missing or unreadable, are written to quarantine.json beside the manifest, so that readers leave them out;
    what stands there already is not reported again.

    Raises UserError where there is nothing that could be a dataset.
    """
    processes = choose_processes(processes)
    folder = open_folder(directory)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder. Give the folder of a dataset or view")
    problems: list[Problem] = []
    base = _check_view(folder, problems) or folder
    verdict = _verify(base, problems, decode, processes, str(folder))
    if quarantine:
        verdict = _write_quarantine(base, verdict)
    _print(verdict, as_json, quarantine)
    return verdict


# The small files of the folder


def _check_view(folder: Folder, problems: list[Problem]) -> Folder | None:
    """The dataset of a view, whose own files are checked here; None for what is no view."""
    content = _read_json(folder, MANIFEST_NAME)
    view = content.get("view") if isinstance(content, dict) else None
    if view is None and folder.size(SELECTION_NAME) is None:
        return None
    own: list[Problem] = []
    _check_listed(folder, [MANIFEST_NAME], _read_checksums(folder, own), own)
    try:
        base = open_folder(view["of"])
        if type(base) is Folder and type(folder) is Folder:
            base = Folder((folder.path / base.path).resolve())
        wanted, fingerprint = view["selection_sha256"], view["fingerprint"]
        samples = content["samples"]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder.locate(MANIFEST_NAME)}: entries of the view are missing. Make the view again"
        ) from None
    if not base.exists():
        raise UserError(f"{folder}: a view of {base}, which is not there. Put it back")
    try:
        bits = folder.read(SELECTION_NAME)
    except FileNotFoundError:
        own.append(Problem(SELECTION_NAME, "missing. Make the view again"))
    else:
        if hashlib.sha256(bits).hexdigest() != wanted:
            own.append(Problem(SELECTION_NAME, "not the selection that the view lists. Make the view again"))
        elif int(np.unpackbits(np.frombuffer(bits, np.uint8)).sum()) != samples:
            own.append(Problem(MANIFEST_NAME, f"tells of {samples} samples, {SELECTION_NAME} selects others"))
    infos, options = _list_shards(base, _read_json(base, MANIFEST_NAME))
    found = Manifest.of_shards(base, infos, options=options).fingerprint
    if found != fingerprint:
        own.append(Problem(MANIFEST_NAME, f"{base} is not the dataset that this view was made of"))
    problems += [replace(problem, file=folder.locate(problem.file)) for problem in own]
    return base


def _read_json(folder: Folder, name: str) -> Any:
    """The content, or None for a file that is missing or no JSON."""
    try:
        return json.loads(folder.read(name))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _read_checksums(folder: Folder, problems: list[Problem]) -> dict[str, str]:
    """What checksums.json lists; nothing where it is missing (older datasets have none) or damaged, which is a problem."""
    if folder.size(CHECKSUMS_NAME) is None:
        return {}
    content = folder.read(CHECKSUMS_NAME)
    try:
        whole = json.loads(content)
        files = {str(name): str(value) for name, value in whole["files"].items()}
        intact = whole["sha256"] == hashlib.sha256(render_json(whole["files"])).hexdigest()
        intact &= content == render_json(whole)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files, intact = {}, False
    if not intact:
        problems.append(Problem(CHECKSUMS_NAME, "damaged: it is not what its own SHA-256 says. Restore it from a copy"))
        return {}
    return files


def _check_listed(folder: Folder, names: Sequence[str], hashes: Mapping[str, str], problems: list[Problem]) -> set[str]:
    """Hold these files against checksums.json; returns the names of those that are not what they were."""
    wrong = set()
    for name in names:
        if name not in hashes:
            continue
        try:
            if hashlib.sha256(folder.read(name)).hexdigest() == hashes[name]:
                continue
            text = f"not the file that {CHECKSUMS_NAME} lists: its SHA-256 differs. Restore it from a copy"
        except FileNotFoundError:
            text = f"missing, though {CHECKSUMS_NAME} lists it. Restore it from a copy"
        problems.append(Problem(name, text))
        wrong.add(name)
    return wrong


def _list_shards(folder: Folder, manifest: Any, damaged: bool = False) -> tuple[list[ShardInfo], dict[str, Any]]:
    """The shards of the dataset and its options: as the manifest says, or the statistics where it is damaged, or else
    the indexes.

    Raises UserError where nothing tells of a shard.
    """
    content = manifest if isinstance(manifest, dict) else {}
    entries = content.get("shards")
    infos = [_read_info(entry) for entry in entries] if isinstance(entries, list) else []
    options = content.get("options")
    names = folder.names()
    if damaged or not infos or None in infos:
        statistics = [_read_info(_read_json(folder, name)) for name in names if name.endswith("_stats.json")]
        infos = [info for info in statistics if info is not None] or [info for info in infos if info is not None]
    if not infos:
        infos = [_describe_by_index(folder, name) for name in names if name.endswith(".tar" + INDEX_SUFFIX)]
    if not infos:
        raise UserError(
            f"{folder}: no {MANIFEST_NAME}, statistics or indexes tell of shards. Is it a finished build? For tars of "
            "others run `python -m data_tools index` first"
        )
    return infos, options if isinstance(options, dict) else {}


def _describe_by_index(folder: Folder, name: str) -> ShardInfo:
    """What can be known of a shard of which only its files are left."""
    index, tar = folder.read(name), name.removesuffix(INDEX_SUFFIX)
    samples = max(0, len(index) // 8 - 1)
    return ShardInfo(tar, samples, folder.size(tar) or 0, "", hashlib.sha256(index).hexdigest())


def _read_info(entry: Any) -> ShardInfo | None:
    """The shard that a manifest's entry or a shard's statistics tell of, or None when they are not readable."""
    try:
        info = ShardInfo(**{name: entry[name] for name in ShardInfo.__dataclass_fields__})
    except (KeyError, TypeError):
        return None
    numbers = all(isinstance(value, int) and 0 <= value < 2**63 for value in (info.samples, info.bytes))
    texts = all(isinstance(value, str) for value in (info.name, info.sha256, info.index_sha256))
    return info if numbers and texts and "/" not in info.name and info.name.endswith(".tar") else None


def _verify(folder: Folder, problems: list[Problem], decode: bool, processes: int, shown: str) -> Verdict:
    if folder.size(RETRY_NAME) is not None:  # the small files beside the manifest may be of the one to come
        raise UserError(f"{folder}: a `retry` has begun here and not finished. Run it again, then verify")
    hashes = _read_checksums(folder, problems)
    wrong = _check_listed(folder, [MANIFEST_NAME, SIZES_NAME, STATE_NAME], hashes, problems)
    content = _read_json(folder, MANIFEST_NAME)
    manifest_problem = _judge_manifest(folder, content)
    if manifest_problem and MANIFEST_NAME not in wrong:
        problems.append(Problem(MANIFEST_NAME, manifest_problem))
    damaged = bool(manifest_problem) or MANIFEST_NAME in wrong
    infos, options = _list_shards(folder, content, damaged)
    foreign = options.get("command") == "index"
    tars = _find_tars(folder, content, infos)
    _check_sizes(folder, infos, SIZES_NAME in wrong, problems)
    there, tar_sizes = set(folder.names()), tars.sizes()
    known = {info.name for info in infos}
    for name in sorted(name for name in tar_sizes if name.endswith(".tar") and name not in known and tars == folder):
        problems.append(Problem(name, f"a tar that {MANIFEST_NAME} does not list. Move it elsewhere", name))
    kinds = {"sidecar": sidecar_name, "statistics": statistics_name}
    wanted = frozenset(kind for kind, name in kinds.items() if any(name(info.name) in there for info in infos))
    quarantine = _read_quarantine(folder, problems)
    tasks, quarantined = [], 0
    for info in infos:
        places = frozenset(place for place in quarantine.get(info.name, {}) if 0 <= place < info.samples)
        quarantined += len(places)
        if info.samples and len(places) == info.samples:
            continue
        files = [info.name + INDEX_SUFFIX, sidecar_name(info.name), statistics_name(info.name)]
        tasks.append(
            _Task(
                tars=tars,
                indexes=folder,
                info=info,
                tar_size=tar_sizes.get(info.name),
                names=frozenset(name for name in files if name in there),
                hashes={name: hashes[name] for name in files if name in hashes},
                foreign=foreign,
                wanted=wanted if not foreign else frozenset(),
                quarantined=places,
                decode=decode,
            )
        )
    size = sum(info.bytes for info in infos)
    found: list[list[Problem]] = [[] for _ in tasks]
    with open_progress_bar(sum(task.info.samples for task in tasks), "sample") as report:
        with closing(run_tasks(_check_shard, tasks, processes, report)) as results:
            for number, part in results:
                found[number] = part
    problems += [problem for part in found for problem in part]
    samples = sum(info.samples for info in infos)
    return Verdict(shown, len(infos), samples, size, quarantined, tuple(problems), has_checksums=bool(hashes))


def _judge_manifest(folder: Folder, content: Any) -> str:
    """What is wrong with the manifest as such, or ""."""
    if folder.size(MANIFEST_NAME) is None:
        return "missing. Restore it from a copy, or run the same build again to finish it"
    if not isinstance(content, dict):
        return "not readable as JSON. Restore it from a copy"
    if content.get("format") != FORMAT:
        return f"format {content.get('format')!r}, this version reads {FORMAT}. Restore it from a copy"
    infos = [_read_info(entry) for entry in content["shards"]] if isinstance(content.get("shards"), list) else [None]
    if None in infos:
        return "entries of its shards are missing. Restore it from a copy"
    totals = {"samples": sum(info.samples for info in infos), "bytes": sum(info.bytes for info in infos)}
    if any(content.get(name) != total for name, total in totals.items()):
        return "its entries contradict each other. Restore it from a copy"
    return ""


def _find_tars(folder: Folder, content: Any, infos: Sequence[ShardInfo]) -> Folder:
    place = content.get("tars") if isinstance(content, dict) else None
    return Manifest.of_shards(folder, infos, tars=place if isinstance(place, str) else None).tars


def _check_sizes(folder: Folder, infos: Sequence[ShardInfo], known_wrong: bool, problems: list[Problem]) -> None:
    wanted = {info.name: info.samples for info in infos}
    if not known_wrong and _read_json(folder, SIZES_NAME) != wanted:
        problems.append(Problem(SIZES_NAME, f"does not say what {MANIFEST_NAME} does. Restore it from a copy"))


def _read_quarantine(folder: Folder, problems: list[Problem]) -> dict[str, dict[int, str]]:
    try:
        return read_quarantine(folder)
    except UserError as error:
        problems.append(Problem(QUARANTINE_NAME, str(error).partition(": ")[2]))
        return {}


# One shard


def _check_shard(task: _Task, report: Report) -> list[Problem]:
    """The problems of one shard, without those of samples in quarantine."""
    findings, info = _Findings(task), task.info
    wrong = _check_hashes(task, findings)
    offsets = _check_index(task, findings)
    rows = None if sidecar_name(info.name) in wrong else _read_rows(task, findings)
    if task.tar_size is None:
        findings.add(info.name, "this shard is missing. Restore it from a copy", "tar")
        report(info.samples)
    else:
        _check_tar(task, findings, offsets, rows, report)
    return [problem for problem in findings.problems if problem.place not in task.quarantined]


def _check_hashes(task: _Task, findings: _Findings) -> set[str]:
    """Hold sidecar and statistics against checksums.json, and say which are missing; returns those that are wrong."""
    wrong: set[str] = set()
    for kind, name in (("sidecar", sidecar_name(task.info.name)), ("statistics", statistics_name(task.info.name))):
        if name not in task.names:
            if name in task.hashes or kind in task.wanted:
                findings.add(name, "missing. Restore it from a copy", kind)
        elif name in task.hashes and hashlib.sha256(task.indexes.read(name)).hexdigest() != task.hashes[name]:
            text = f"not the file that {CHECKSUMS_NAME} lists: its SHA-256 differs. Restore it from a copy"
            findings.add(name, text, kind)
            wrong.add(name)
    name = statistics_name(task.info.name)
    if name in task.names and name not in wrong and not task.foreign:
        statistics = _read_json(task.indexes, name)
        if _read_info(statistics) != task.info:
            findings.add(name, f"does not say what {MANIFEST_NAME} does. Restore it from a copy", "statistics")
    return wrong


def _check_index(task: _Task, findings: _Findings) -> np.ndarray | None:
    """The offsets, or None where the index is missing or not the manifest's."""
    name = task.info.name + INDEX_SUFFIX
    if name not in task.names:
        findings.add(name, "this index is missing. Restore it from a copy", "index")
        return None
    content = task.indexes.read(name)
    if hashlib.sha256(content).hexdigest() != task.info.index_sha256:
        text = f"not the index that {MANIFEST_NAME} lists: its SHA-256 differs. Restore it from a copy"
        findings.add(name, text, "index")
        return None
    offsets = np.frombuffer(content[: len(content) // 8 * 8], "<u8")
    if len(offsets) != task.info.samples + 1 or not bool((offsets[1:] > offsets[:-1]).all()):
        findings.add(name, f"these are not the offsets of {task.info.samples} samples. Restore it from a copy", "index")
        return None
    return offsets


def _read_rows(task: _Task, findings: _Findings) -> list[dict[str, Any]] | None:
    """The sidecar's rows of samples, in the order of the tar; None where there is no usable sidecar."""
    import pyarrow
    import pyarrow.parquet

    name = sidecar_name(task.info.name)
    if name not in task.names:
        return None
    try:
        # Not read_table: threads of its scanner may still run when the process ends, and abort it.
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(task.indexes.read(name)), pre_buffer=False)
        table = file.read(use_threads=False)
        rows = [row for row in table.to_pylist() if row["status"] == "success"]
        keys = [str(row["key"]) for row in rows]
    except MemoryError:
        raise
    except Exception as error:
        # Damaged parquet makes pyarrow raise almost anything.
        findings.add(name, f"not readable as a sidecar: {type(error).__name__}. Restore it from a copy", "sidecar")
        return None
    if len(rows) != task.info.samples:
        text = f"tells of {len(rows)} samples, {MANIFEST_NAME} of {task.info.samples}. Restore it from a copy"
        findings.add(name, text, "sidecar")
        return None
    if len(set(keys)) < len(keys) and not task.foreign:
        findings.add(name, "has a key twice. Build the shard again", "sidecar")
    return rows


def _check_tar(
    task: _Task, findings: _Findings, offsets: np.ndarray | None, rows: list[dict[str, Any]] | None, report: Report
) -> None:
    """Read the tar once: its hash, and each sample's bytes against headers, sidecar and pictures' hashes.

    Only where the hash is not the manifest's, the samples are gone through again to find those that have changed.
    """
    info, size = task.info, task.tar_size or 0
    blamed: dict[int, tuple[str | None, str]] = {}  # by the tar itself
    differing: dict[int, tuple[str | None, str]] = {}  # from the sidecar
    lost = done = 0
    digest = hashlib.sha256()
    try:
        file = task.tars.open_ranges(info.name)
        if offsets is None:
            offsets = _find_offsets(info, rows, file.read, size)
        for place, data in _read_samples(file.read, offsets, size, digest if info.sha256 else None):
            done += 1
            report(1, size=len(data))
            if int(offsets[place + 1]) > size:
                lost += 1
                continue
            key, text = _check_sample(task, data, int(offsets[place]))
            if text:
                blamed[place] = (key, text)
            elif rows and (text := _compare_with_row(rows[place], data, int(offsets[place]), task.decode)):
                differing[place] = (key, text)
        changed = bool(info.sha256) and digest.hexdigest() != info.sha256
        if changed and not task.foreign:
            rest = set(range(len(offsets) - 1)) - blamed.keys() - differing.keys()
            whole = ((place, data) for place, data in _read_samples(file.read, offsets, size, None) if place in rest)
            blamed |= _compare_with_writer(rows, ((place, data) for place, data in whole if offsets[place + 1] <= size))
        end = int(offsets[-1]) if len(offsets) else 0
        has_end = end < size and file.read(end, size) == ARCHIVE_END
    except OSError as error:
        findings.add(info.name, f"cannot be read: {error.strerror or error}. Restore it from a copy", "tar")
        return
    finally:
        report(info.samples - done)
    if size != info.bytes:
        text = f"{size} bytes, {MANIFEST_NAME} says {info.bytes}"
        findings.add(info.name, f"{text}: {lost} of {info.samples} samples are lost. Restore it from a copy", "tar")
    if info.sha256 and not changed:  # then it is the sidecar that is wrong
        for place, (key, text) in differing.items():
            findings.add(sidecar_name(info.name), text, "sidecar", place, key)
    else:
        blamed |= differing
    for place, (key, text) in sorted(blamed.items()):
        findings.add(info.name, text, "sample", place, str(rows[place]["key"]) if key is None and rows else key)
    if changed and size == info.bytes:
        if not has_end and not task.foreign:
            text = f"the archive's end is damaged, from byte {end}; the samples are whole. Restore it from a copy"
            findings.add(info.name, text, "end")
        elif not blamed:
            text = f"not the tar that {MANIFEST_NAME} lists: its SHA-256 differs, in no sample that could be told"
            findings.add(info.name, f"{text}. Restore it from a copy", "tar")


def _find_offsets(info: ShardInfo, rows: list[dict[str, Any]] | None, read: Any, size: int) -> np.ndarray:
    """Where the samples are when the index does not tell: as the sidecar says, else by the headers, while they last."""
    if rows and all(isinstance(row.get("offset"), int) and isinstance(row.get("size"), int) for row in rows):
        ends = [row["offset"] + row["size"] for row in rows]
        if all(0 <= row["offset"] < end for row, end in zip(rows, ends, strict=True)):
            offsets = [row["offset"] for row in rows] + ends[-1:]
            if all(one < other for one, other in zip(offsets, offsets[1:], strict=False)):
                return np.array(offsets, dtype=np.uint64)
    offsets, last, end = [], None, 0
    try:
        for member in walk_members(read, size):
            if is_sample_file(member.name) and split_name(member.name)[0] != last:
                last = split_name(member.name)[0]
                offsets.append(member.offset)
            end = member.end
    except TarError:
        pass
    return np.array([*offsets, end][: info.samples + 1], dtype=np.uint64)


def _read_samples(read: Any, offsets: np.ndarray, size: int, digest: Any) -> Iterator[tuple[int, bytes]]:
    """The place and the bytes of each sample. Everything in the tar, also what lies between, goes into the digest."""

    def skip(start: int, end: int) -> None:
        while digest is not None and start < end:
            data = read(start, min(end, start + _CHUNK_BYTES))
            if not data:
                return
            digest.update(data)
            start += len(data)

    done = 0
    for place in range(len(offsets) - 1):
        start, end = int(offsets[place]), min(int(offsets[place + 1]), size)
        skip(done, start)
        data = read(start, end) if start < end else b""
        if digest is not None:
            digest.update(data)
        done = max(end, start)
        yield place, data
    skip(done, size)


def _check_sample(task: _Task, data: bytes, start: int) -> tuple[str | None, str]:
    """The key of a sample and what is wrong with it in itself, or ""."""
    names: list[str] = []
    try:
        for member in walk_members(lambda one, other: data[one:other], len(data), is_part=True):
            if is_sample_file(member.name):
                names.append(member.name)
    except TarError as error:
        return None, f"at byte {start + error.offset} {error.text}"
    if not names:
        return None, f"at byte {start} no file of a sample begins"
    key = split_name(names[0])[0]
    keys = {split_name(name)[0] for name in names}
    if len(keys) > 1:
        return key, f"holds files of {len(keys)} keys, valid is one"
    if len(set(names)) < len(names):
        return key, "holds two files of one name"
    return key, _decode(_find_picture(data)) if task.decode else ""


def _find_picture(data: bytes) -> bytes | None:
    """The picture among the members of a sample."""
    fields = {
        split_name(member.name)[1]: member
        for member in walk_members(lambda one, other: data[one:other], len(data), is_part=True)
        if is_sample_file(member.name)
    }
    picture = next((fields[extension] for extension in PICTURE_EXTENSIONS if extension in fields), None)
    return None if picture is None else data[picture.start : picture.start + picture.size]


def _compare_with_row(row: Mapping[str, Any], data: bytes, start: int, decode: bool) -> str:
    """What of a sample whose members are right is not as its sidecar's row says, or ""."""
    members = walk_members(lambda one, other: data[one:other], len(data), is_part=True)
    key = next(split_name(member.name)[0] for member in members if is_sample_file(member.name))
    if key != row["key"]:
        return f"its key is not that of the sidecar, {row['key']}"
    picture = _find_picture(data)
    if decode and picture is not None and row.get("width") is not None:
        width, height = read_picture_size(picture)
        if (row["width"], row.get("height")) != (width, height):
            return f"its picture has {width} x {height} pixels, the sidecar says {row['width']} x {row.get('height')}"
    if row.get("offset") is None or row.get("size") is None:
        return ""  # a sidecar of others, whose hash need not be that of the stored picture
    if (row["offset"], row["size"]) != (start, len(data)):
        return f"lies at byte {start}, {len(data)} bytes long; the sidecar says {row['offset']}, {row['size']}"
    if row.get("sha256") is None:
        return ""
    if picture is None:
        return "has no picture"
    if hashlib.sha256(picture).hexdigest() != row["sha256"]:
        return "its picture is not the one that was written: the SHA-256 differs from the sidecar's"
    return ""


def _compare_with_writer(
    rows: Sequence[Mapping[str, Any]] | None, samples: Iterable[tuple[int, bytes]]
) -> dict[int, tuple[str | None, str]]:
    """Which samples of our own writer, whose headers and pictures are right, are not as it wrote them: key and why.

    What most samples say otherwise than their rows do is a way of the command that made them, and no damage.
    """
    changed: dict[int, tuple[str | None, str]] = {}
    otherwise: dict[int, tuple[str | None, set[str]]] = {}
    count = 0
    for place, data in samples:
        count += 1
        key, names = None, set()
        for member in walk_members(lambda one, other, data=data: data[one:other], len(data), is_part=True):
            key, extension = split_name(member.name)
            content = data[member.start : member.start + member.size]
            written = render_member(member.name, content)
            if data[member.offset : member.end] != written:
                is_header = data[member.offset : member.start] != written[:BLOCK_BYTES]
                changed[place] = (key, f"the {'header' if is_header else 'padding'} of its {extension} has changed")
                break
            if rows and extension == "txt" and content != str(rows[place].get("caption")).encode():
                names.add("its txt is not the caption of the sidecar")
            if rows and extension == "json":
                names |= {
                    f"its json is not what the sidecar says ({name})" for name in _compare_json(content, rows[place])
                }
        if names and place not in changed:
            otherwise[place] = (key, names)
    often = Counter(name for _, names in otherwise.values() for name in names)
    usual = {name for name, times in often.items() if times > max(1, count // 2)}
    for place, (key, names) in otherwise.items():
        if names - usual:
            changed[place] = (key, min(names - usual).partition(" (")[0])
    return changed


def _compare_json(content: bytes, row: Mapping[str, Any]) -> set[str]:
    """The names for which the json of a sample does not say what the sidecar's row says; "form" where our writer would
    have written it otherwise."""
    try:
        described = json.loads(content)
        forms = [json.dumps(described, ensure_ascii=plain).encode() for plain in (False, True)]
    except (ValueError, RecursionError):
        return {"form"}
    if content not in forms or not isinstance(described, dict):
        return {"form"}
    differing = set()
    for name, value in described.items():
        columns = [column for column in (name, f"source_{name}") if column in row]
        if not any(_is_same(value, row[column]) for column in columns):
            differing.add(name)
    return differing | {name for name in _IN_JSON if row.get(name) is not None and name not in described}


def _is_same(value: Any, other: Any) -> bool:
    """Equality of a value in json and of one in a column, which holds what it has no type for as JSON text."""
    if value == other:
        return True
    if isinstance(other, str) and not isinstance(value, str):
        try:
            return json.loads(other) == value
        except ValueError:
            return False
    return False


def _decode(picture: bytes | None) -> str:
    """Decode a picture wholly; what is wrong with it, or ""."""
    import simplejpeg
    from PIL import Image

    from data_tools.image import FORMATS

    if picture is None:
        return "has no picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(picture), formats=FORMATS)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                simplejpeg.decode_jpeg(picture, colorspace="RGB", strict=True)
            else:
                image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Decoders answer to damaged pictures with almost any exception; Pillow's text names an address.
        return f"its picture cannot be decoded ({type(error).__name__})"
    return ""


# What came of it


def _write_quarantine(folder: Folder, verdict: Verdict) -> Verdict:
    """Add the samples that cannot be used to quarantine.json; problems of sidecars and the like take out none."""
    infos, _ = _list_shards(folder, _read_json(folder, MANIFEST_NAME))
    samples = {info.name: info.samples for info in infos}
    with folder.lock():
        try:
            entries = read_quarantine(folder)
        except UserError:
            entries = {}
        before = sum(len(places) for places in entries.values())
        for problem in verdict.problems:
            if problem.kind == "sample" and problem.shard:
                entries.setdefault(problem.shard, {}).setdefault(problem.place, f"{problem.key}: {problem.text}")
        for problem in verdict.problems:
            if problem.kind in _OF_THE_TAR and problem.shard:
                places = entries.setdefault(problem.shard, {})
                for place in range(samples.get(problem.shard, 0)):
                    places.setdefault(place, f"{problem.file}: {problem.text}")
        content = {
            name: {str(place): why for place, why in sorted(places.items())} for name, places in sorted(entries.items())
        }
        after = sum(len(places) for places in entries.values())
        if after > before:
            folder.write_json(QUARANTINE_NAME, content)
    return replace(verdict, newly_quarantined=after - before)


def _print(verdict: Verdict, as_json: bool, quarantine: bool) -> None:
    if as_json:
        print(json.dumps(asdict(verdict), ensure_ascii=False))
        return
    for problem in verdict.problems[:_PROBLEMS_SHOWN]:
        print(problem)
    if len(verdict.problems) > _PROBLEMS_SHOWN:
        print(f"... and {len(verdict.problems) - _PROBLEMS_SHOWN} more (all of them with --json)")
    if not verdict.has_checksums:
        print(
            f"{verdict.directory}: without {CHECKSUMS_NAME}, sidecars and statistics can only be held against the tars"
        )
    left_out = f"; {verdict.quarantined} samples are in quarantine" if verdict.quarantined else ""
    if not verdict.problems:
        size = format_bytes(verdict.bytes)
        print(f"{verdict.directory}: all is well: {verdict.samples} samples, {size} in {verdict.shards} tars{left_out}")
        return
    count = len(verdict.problems)
    print(f"{verdict.directory}: {count} problem{'s' * (count > 1)} in {verdict.shards} shards{left_out}")
    if quarantine:
        print(
            f"{verdict.directory}: {verdict.newly_quarantined} samples put into {QUARANTINE_NAME}; readers leave them out"
        )
