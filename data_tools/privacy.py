"""A shard folder -> a new one without personal data: captions masked, faces hidden, and whoever asked to be left out gone.

Shard for shard, and crash-only as `build` is (see folder.py): the same shards, options and software make the same bytes,
whatever the number of processes and however often the run was interrupted.
"""

import hashlib
import io
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import pyarrow
import pyarrow.parquet

from data_tools.errors import UserError
from data_tools.faces import CELLS, QUALITY, Box, FaceError, FaceFinder, hide_faces
from data_tools.files import Folder, format_bytes, format_counts, hash_file, open_folder
from data_tools.folder import (
    add_counts,
    complete_shard,
    identify,
    is_finished,
    load_state,
    make_shards,
    prepare_folder,
    remove_run,
    select_info,
)
from data_tools.personal import KINDS, mask_personal_data
from data_tools.shards import Manifest, RawSample, ShardError, ShardReader, sidecar_name, write_shard
from data_tools.workers import Report, choose_processes

COMMAND = "privacy"
CAPTIONS = ("mask", "drop", "keep")
FACES = ("blur", "keep")
REMOVED = "removed: opt-out"
PICTURES = ("jpg", "jpeg", "png", "webp")
_RULES = 1
"""Raised when other things are found or hidden, so that no folder is made half by one set of rules and half by another."""

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_NOT_TEXT = frozenset({"key", "source", "sha256", "status"})
"""Entries that say which sample it is, by which it is found again: never masked, and left out for a removed sample."""
_PROSE = frozenset({"caption", "captions", "error"})

_IDENTIFIERS = ("key", "source", "url", "sha256")
_BOX_COLUMNS = ("key", "x", "y", "width", "height")


@dataclass(frozen=True)
class _Rules:
    """What is to be done with every sample. Called with a shard's task, in a worker, it makes that shard."""

    source: Manifest
    out: Folder
    build: str
    captions: str
    faces: str
    boxes: Path | None
    removals: frozenset[str]

    def __call__(self, number: int, report: Report) -> dict[str, Any]:
        return _clean_shard(self, number, report)


def clean_dataset(
    directory: str | Path,
    out: str | Path,
    *,
    captions: str = "mask",
    faces: str = "blur",
    boxes: str | Path | None = None,
    remove: Sequence[str | Path] | None = None,
    processes: int | None = None,
    restart: bool = False,
    json: bool = False,
) -> Manifest:
    """Write the shard folder `directory` anew into `out`, without personal data.

    `captions`: "mask" puts [email], [phone], ... in place of what personal.py finds, "drop" drops such samples, "keep"
    leaves captions alone. The other texts of a sample (extra columns, but for whole URLs and whole numbers) are masked
    as its captions are. `faces`: "blur" hides the faces that faces.py finds, or those of `boxes`, a parquet with the
    columns key, x, y, width, height in pixels of the stored picture; only pictures with faces are encoded again.
    `remove` are lists with one entry a line, each a key, a source, a URL or the SHA-256 of a stored picture: these
    samples go. The manifest then has the lists' hashes and the SHA-256 of each entry that was met.

    Shards keep their names and samples their keys; the sidecars keep a row for each that went. Raises UserError for
    input that cannot be used, for a folder that holds something else, and when no sample would be left.
    """
    out, remove = open_folder(out), remove or ()
    _check_choices(captions, faces, boxes)
    source = Manifest.load(directory)
    if _is_same(out, source.indexes) or _is_same(out, source.directory):
        raise UserError(f"{out}: this is the folder to read. Give a new one: nothing is changed in place")
    if captions == "keep" and faces == "keep" and boxes is None and not remove:
        raise UserError(
            "--captions keep --faces keep without --remove: nothing would be changed. Leave one of them out"
        )
    removals = frozenset().union(*(_read_removals(Path(path)) for path in remove))
    options = {
        "command": COMMAND,
        "rules": _RULES,
        "source_build": source.build,
        "source_fingerprint": source.fingerprint,
        "captions": captions,
        "faces": faces,
        "boxes_sha256": None if boxes is None else hash_file(_check_boxes(Path(boxes))),
        "removal_lists_sha256": sorted(hash_file(path) for path in remove),
    }
    rules = _Rules(source, out, identify(options), captions, faces, None if boxes is None else Path(boxes), removals)
    processes = choose_processes(processes)
    out.make()
    with out.lock():
        state = load_state(out, COMMAND)
        if state is not None and restart:
            remove_run(out, state)
            state = None
        versions = _list_versions(faces)
        if state is not None and is_finished(out, state, options, versions):
            manifest = Manifest.load(out)
            _print_report(manifest, f"{out}: finished already, with {manifest.samples} samples", json)
            return manifest
        prepare_folder(out, [Path(shard.name).stem for shard in source.shards], state, options, **versions)
        return _clean(rules, {**options, **versions}, processes, json)


def _is_same(one: Folder, other: Folder) -> bool:
    if type(one) is Folder and type(other) is Folder:
        return one.path.resolve() == other.path.resolve()
    return one == other


# What is to be done


def _check_choices(captions: str, faces: str, boxes: str | Path | None) -> None:
    for option, choice, valid in (("captions", captions, CAPTIONS), ("faces", faces, FACES)):
        if choice not in valid:
            raise UserError(f"--{option} {choice}: unknown. Valid: {', '.join(valid)}")
    if boxes is not None and faces == "keep":
        raise UserError("--boxes with --faces keep: boxes are there to be blurred. Leave one of them out")


def _read_removals(path: Path) -> frozenset[str]:
    """The entries of a removal list; hashes in small letters."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Give a list with one key, source, URL or SHA-256 a line") from None
    entries = frozenset(line.strip() for line in lines) - {""}
    if not entries:
        raise UserError(f"{path}: the list is empty. Give one key, source, URL or SHA-256 a line")
    return frozenset(entry.lower() if _SHA256.fullmatch(entry) else entry for entry in entries)


def _check_boxes(path: Path) -> Path:
    try:
        schema = pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowInvalid:
        raise UserError(f"{path}: not a parquet file. Give one with the columns {', '.join(_BOX_COLUMNS)}") from None
    missing = [name for name in _BOX_COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: no column '{missing[0]}'. Needed: {', '.join(_BOX_COLUMNS)}; found: {', '.join(schema.names)}"
        )
    for name in _BOX_COLUMNS:
        kind = schema.field(name).type
        text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        number = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
        if not (text if name == "key" else number):
            raise UserError(f"{path}: column '{name}' holds {kind}. Valid: keys as strings, and numbers of pixels")
    return path


def _list_versions(faces: str) -> dict[str, str]:
    versions = {"pillow": PIL.__version__}
    if faces == "blur":
        versions["opencv"] = _import_cv2().__version__
    return versions


def _import_cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError(
            "--faces blur: needs OpenCV. Install it with `pip install opencv-python-headless`, or give --faces keep"
        ) from None
    return cv2


def _load_boxes(path: Path, keys: list[str]) -> dict[str, list[Box]]:
    """The boxes of these samples. Of a file that is sorted by key, only the parts with these keys are read."""
    first, last = min(keys), max(keys)
    filters = [("key", ">=", first), ("key", "<=", last)]
    boxes: dict[str, list[Box]] = {}
    wanted = set(keys)
    table = pyarrow.parquet.read_table(
        path, columns=list(_BOX_COLUMNS), filters=filters, use_threads=False, pre_buffer=False
    )
    for row in table.to_pylist():
        if row["key"] not in wanted:
            continue
        sides = [row[name] for name in _BOX_COLUMNS[1:]]
        if any(side is None or not abs(side) < 2**31 for side in sides) or sides[2] <= 0 or sides[3] <= 0:
            raise UserError(
                f"{path}: key {row['key']}: x, y, width, height are {sides}. Give numbers, sizes greater than 0"
            )
        boxes.setdefault(row["key"], []).append(Box(*map(float, sides)))
    return {key: sorted(found) for key, found in boxes.items()}


# The work


def _clean(rules: _Rules, options: dict[str, Any], processes: int, as_json: bool) -> Manifest:
    """Make the shards that are not there yet, then the manifest, and say what came of it."""
    source = rules.source
    stems = [shard.name.removesuffix(".tar") for shard in source.shards]
    started_s = time.monotonic()
    tell = (lambda text: None) if as_json else print
    numbers, samples = range(len(stems)), source.counts.tolist()
    shards, tried = make_shards(rules.out, rules.build, stems, rules, numbers, samples, processes, tell=tell)
    elapsed_s = time.monotonic() - started_s
    entries = sorted(set().union(*(statistics["removed_entries_sha256"] for statistics in shards)))
    report = {
        "masked": add_counts(statistics["masked"] for statistics in shards),
        "dropped": add_counts(statistics["dropped"] for statistics in shards),
        "faces": sum(statistics["faces"] for statistics in shards),
        "pictures_with_faces": sum(statistics["pictures_with_faces"] for statistics in shards),
        "removed": {
            "samples": sum(statistics["removed"] for statistics in shards),
            "entries_asked": len(rules.removals),
            "entries_met": len(entries),
            "entries_sha256": entries,
        },
    }
    _check_boxes_met(rules, sum(statistics["boxes"] for statistics in shards))
    failures = add_counts(statistics["failures_by_reason"] for statistics in shards)
    manifest = Manifest.of_shards(
        rules.out,
        [select_info(statistics) for statistics in shards],
        rules.build,
        failures.total(),
        sum(statistics["captions"] for statistics in shards),
        {**options, "report": report},
    )
    if manifest.samples == 0:
        raise UserError(f"{rules.out}: no sample would be left ({format_counts(failures)}). Give other options")
    manifest.write()
    rate = tried / max(elapsed_s, 1e-9)
    text = (
        f"{rules.out}: {manifest.samples} of {source.samples} samples, {manifest.captions} captions, "
        f"{format_bytes(manifest.bytes)} in {len(shards)} tars; {rate:.0f} samples/s"
    )
    _print_report(manifest, text, as_json)
    return Manifest.load(rules.out)


def _check_boxes_met(rules: _Rules, met: int) -> None:
    if rules.boxes is None:
        return
    given = pyarrow.parquet.read_metadata(rules.boxes).num_rows
    if met == 0:
        raise UserError(
            f"{rules.boxes}: none of its {given} keys is in {rules.source.directory}. Give this dataset's boxes"
        )
    if met < given:
        print(f"warning: {rules.boxes}: {given - met} of {given} boxes have keys of other samples", file=sys.stderr)


def _print_report(manifest: Manifest, text: str, as_json: bool) -> None:
    report = manifest.options["report"]
    if as_json:
        facts = {"samples": manifest.samples, "failures": manifest.failures, "captions": manifest.captions}
        print(json.dumps({"out": str(manifest.directory), **facts, **report, "fingerprint": manifest.fingerprint}))
        return
    print(text)
    removed, options = report["removed"], manifest.options
    if options["captions"] == "mask":
        print(f"masked: {format_counts(report['masked']) or 'nothing was found'}")
    if options["captions"] == "drop":
        print(f"dropped: {format_counts(report['dropped']) or 'nothing was found'}")
    if options["faces"] == "blur":
        by = "the given boxes" if options["boxes_sha256"] else "OpenCV's Haar cascades, which miss many: see --help"
        print(f"faces: {report['faces']} hidden in {report['pictures_with_faces']} pictures, encoded again at quality")
        print(f"       {QUALITY}; {CELLS * CELLS} mean colours are left of each. Found by {by}")
    if options["removal_lists_sha256"]:
        print(
            f"removed: {removed['samples']} samples, by {removed['entries_met']} of {removed['entries_asked']} entries; "
            "proof in manifest.json"
        )


def _clean_shard(rules: _Rules, number: int, report: Report) -> dict[str, Any]:
    """Write one shard's tar, index, sidecar and, last, its statistics; return the statistics."""
    source, name = rules.source, rules.source.shards[number].name
    where = source.tars.locate(name)
    table = source.read_sidecar(number, failures=True)
    _check_sidecar(source.indexes.locate(sidecar_name(name)), table.schema)
    rows = table.to_pylist()
    cleaner = _Cleaner(rules, [row["key"] for row in rows])
    reader, places = ShardReader(source), iter(source.places(number).tolist())
    cleaned = []
    with rules.out.together() as out:
        with closing(reader), _one_thread(rules.faces), write_shard(out, name) as writer:
            for row in rows:
                sample = None
                if row["status"] == "success":
                    place = next(places)
                    sample = reader.read_place(number, place)
                    if sample.key != row["key"]:
                        raise ShardError(
                            f"{where}: sample {place} has the key {sample.key}, its sidecar says {row['key']}. Restore "
                            "both from a copy"
                        )
                    _check_picture(where, row, sample)
                row, fields = cleaner.clean(row, sample)
                if fields is not None:
                    row["offset"], row["size"] = writer.add(row["key"], fields)
                cleaned.append(row)
                if sample is not None:
                    report(1, (row["error"] or "") if fields is None else "", row["size"] if fields is not None else 0)
        facts = {
            "masked": dict(sorted(cleaner.masked.items())),
            "dropped": dict(sorted(cleaner.dropped.items())),
            "faces": cleaner.faces,
            "pictures_with_faces": cleaner.pictures_with_faces,
            "boxes": cleaner.boxes_met,
            "removed": cleaner.removed,
            "removed_entries_sha256": sorted(cleaner.removed_entries),
        }
        return complete_shard(out, writer.info, rules.build, cleaned, table.schema, **facts)


def _check_sidecar(where: str, schema: pyarrow.Schema) -> None:
    needed = {"key", "status", "error", "caption", "captions", "width", "height", "sha256", "offset", "size"}
    missing = sorted(needed - set(schema.names))
    if missing:
        raise UserError(f"{where}: no column '{missing[0]}'. `{COMMAND}` takes a folder that `build` wrote")


def _check_picture(where: str, row: dict[str, Any], sample: RawSample) -> None:
    """Damage that was copied would get a good checksum in the new folder: stop at it."""
    pictures = [data for name, data in sample.fields.items() if name in PICTURES]
    if row["sha256"] and row["sha256"] not in (hashlib.sha256(data).hexdigest() for data in pictures):
        raise ShardError(f"{where}: key {row['key']}: not the picture that its sidecar lists. Restore it from a copy")


class _one_thread:
    """OpenCV with one thread inside the block: the processes are what runs side by side."""

    def __init__(self, faces: str) -> None:
        self._cv2 = _import_cv2() if faces == "blur" else None

    def __enter__(self) -> None:
        if self._cv2:
            self._before = self._cv2.getNumThreads()
            self._cv2.setNumThreads(1)

    def __exit__(self, *_: object) -> None:
        if self._cv2:
            self._cv2.setNumThreads(self._before)


class _Cleaner:
    """Applies the rules to the samples of one shard, and counts."""

    def __init__(self, rules: _Rules, keys: list[str]) -> None:
        self._rules = rules
        self._boxes = _load_boxes(rules.boxes, keys) if rules.boxes and keys else {}
        self._finder = FaceFinder() if rules.faces == "blur" and rules.boxes is None else None
        self.boxes_met = sum(map(len, self._boxes.values()))
        self.masked: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.removed_entries: set[str] = set()
        self.removed = self.faces = self.pictures_with_faces = 0

    def clean(self, row: dict[str, Any], sample: RawSample | None) -> tuple[dict[str, Any], dict[str, bytes] | None]:
        """The sidecar's row and the tar's members of a sample as they are to be; no members when it goes.

        `sample` is None for a row that was a failure before: it stays one, and its texts are masked all the same.
        """
        asked = self._find_entries(row, sample)
        if asked:
            self.removed += 1
            self.removed_entries.update(hashlib.sha256(entry.encode()).hexdigest() for entry in asked)
            return {"key": row["key"], "status": "failure", "error": REMOVED}, None
        masked, fields, kinds = self._mask(row, sample)
        if kinds and self._rules.captions == "drop":
            if sample is None:
                return {**row, **dict.fromkeys(self._texts(row)), "error": masked["error"]}, None
            self.dropped.update(kinds.keys())
            names = ", ".join(KINDS[kind] for kind in KINDS if kind in kinds)
            return self._fail(row, f"dropped: {names}"), None
        if sample is None:
            self.masked += kinds
            return masked, None
        if self._rules.faces == "blur":
            try:
                masked, fields = self._hide_faces(masked, fields)
            except FaceError as error:
                return self._fail(masked, f"picture not looked at: {error}"), None
        self.masked += kinds
        return masked, fields

    def _fail(self, row: dict[str, Any], error: str) -> dict[str, Any]:
        """The row of a sample that goes: which it was and why, and none of its texts and facts."""
        kept = {name: row[name] for name in ("key", "source") if name in row}
        return {**kept, "status": "failure", "error": error}

    def _find_entries(self, row: dict[str, Any], sample: RawSample | None) -> set[str]:
        """The entries of the removal lists that this sample is meant by."""
        if not self._rules.removals:
            return set()
        names = {row.get(name) for name in _IDENTIFIERS}
        if sample is not None:
            names |= {hashlib.sha256(data).hexdigest() for name, data in sample.fields.items() if name in PICTURES}
        return {name for name in names if isinstance(name, str)} & self._rules.removals

    def _texts(self, row: dict[str, Any]) -> list[str]:
        return [name for name, value in row.items() if name not in _NOT_TEXT and isinstance(value, (str, list, dict))]

    def _mask(
        self, row: dict[str, Any], sample: RawSample | None
    ) -> tuple[dict[str, Any], dict[str, bytes] | None, Counter[str]]:
        """The row and the members with their texts masked, and how many of each kind stood in the sample.

        A text that is in the row, in `txt` and in `json` counts once: a kind's count is that of the place with most.
        """
        fields = None if sample is None else dict(sample.fields)
        if self._rules.captions == "keep":
            return row, fields, Counter()
        masked, in_row = dict(row), Counter()
        for name in self._texts(row):
            masked[name], found = _mask_value(row[name], name in _PROSE)
            # `caption` is the first of `captions`, and both tell of one text
            in_row += Counter() if name == "caption" and row.get("captions") else found
        kinds = in_row
        if fields is not None:
            for name in ("txt", "json"):
                if name in fields:
                    fields[name], found = _mask_member(name, fields[name])
                    kinds |= found
        return masked, fields, kinds

    def _hide_faces(self, row: dict[str, Any], fields: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The row and the members with the faces in the picture hidden. Raises FaceError."""
        for name in [name for name in fields if name in PICTURES]:
            boxes = self._boxes.get(row["key"], [])
            data, width, height, faces = hide_faces(fields[name], self._finder, boxes)
            if not faces:
                continue
            self.faces += faces
            self.pictures_with_faces += 1
            facts = {"sha256": hashlib.sha256(data).hexdigest(), "width": width, "height": height}
            row, fields = {**row, **facts}, {**fields, name: data}
            if "json" in fields:
                fields["json"] = _update_json(fields["json"], facts)
        return row, fields


def _mask_value(value: Any, prose: bool = False) -> tuple[Any, Counter[str]]:
    """Mask the texts in a value of a sidecar or of JSON, however deep.

    Of what is not `prose`, a text that is all URL or all digits is a name or a number to find something by: it is kept.
    """
    counts: Counter[str] = Counter()
    if isinstance(value, str) and not prose:
        if _URL.fullmatch(value) or value.isdigit():
            return value, counts
        if value[:1] in ("{", "["):
            try:
                inside = json.loads(value)
            except ValueError:
                inside = None
            if isinstance(inside, (dict, list)):
                inside, counts = _mask_value(inside)
                return (json.dumps(inside, ensure_ascii=False) if counts else value), counts
    if isinstance(value, str):
        return mask_personal_data(value)
    if isinstance(value, list):
        pairs = [_mask_value(entry, prose) for entry in value]
        return [entry for entry, _ in pairs], add_counts(found for _, found in pairs)
    if isinstance(value, dict):
        pairs = [(name, *_mask_value(entry, prose)) for name, entry in value.items()]
        return {name: entry for name, entry, _ in pairs}, add_counts(found for _, _, found in pairs)
    return value, counts


def _mask_member(extension: str, data: bytes) -> tuple[bytes, Counter[str]]:
    """Mask the member `txt` or `json`; without a finding its bytes stay. Text that is not UTF-8 is read as Latin-1."""
    if extension == "json":
        content = _read_json(data)
        if content is not None:
            masked, counts = {}, Counter()
            for name in content.keys() - _NOT_TEXT:
                masked[name], found = _mask_value(content[name], name in _PROSE)
                counts += Counter() if name == "caption" and content.get("captions") else found
            return (json.dumps({**content, **masked}, ensure_ascii=False).encode() if counts else data), counts
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    masked, counts = mask_personal_data(text)
    return (masked.encode() if counts else data), counts


def _read_json(data: bytes) -> dict[str, Any] | None:
    try:
        content = json.load(io.BytesIO(data))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _update_json(data: bytes, facts: dict[str, Any]) -> bytes:
    """The member `json` with facts about the changed picture, of those that it tells at all."""
    content = _read_json(data)
    if content is None:
        return data
    return json.dumps(
        {**content, **{name: facts[name] for name in facts if name in content}}, ensure_ascii=False
    ).encode()
