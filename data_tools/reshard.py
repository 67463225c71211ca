"""Datasets -> new shards: merged, split, shuffled or sampled; the same bytes however often it was interrupted.

The plan comes first: where each sample goes is a pure function of the sources' sizes and the seed (a number a sample in
memory), and DuckDB sorts the sidecars' rows by it, within a memory limit and on disk beyond. It ends as a parquet file
for each new shard with all that is known of its samples and where their bytes are, so any process can make any shard
alone. Pictures are copied byte for byte.
"""

import hashlib
import json
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.database import RESHARD_MEMORY, connect
from data_tools.errors import UserError
from data_tools.files import Folder, format_bytes, open_folder, write_json_atomic
from data_tools.folder import (
    PLAN_NAME,
    choose_plan_place,
    complete_shard,
    identify,
    is_finished,
    list_sidecar_fields,
    load_state,
    make_shards,
    name_shards,
    prepare_folder,
    remove_run,
    select_info,
)
from data_tools.index import describe_sample
from data_tools.shards import PICTURE_EXTENSIONS, Manifest, ShardError, write_shard
from data_tools.shards import sidecar_name as name_sidecar
from data_tools.tar import TarError, is_sample_file, parse_members, split_name
from data_tools.workers import Report, choose_processes, open_progress_bar

if TYPE_CHECKING:
    import duckdb
    import pyarrow

_ROWS_AT_ONCE = 20_000
_OPEN_TARS = 256
_PLAN = ("_position", "_tar", "_start", "_end", "_shown")
"""Columns of the plan besides the sidecars': the place in the new order, folder and name of the tar, the bytes there,
and the key in the source."""
_MADE_ANEW = ("status", "error", "offset", "size", "original_key")
_SAMPLING, _SHUFFLING = 1, 2


@dataclass(frozen=True)
class _Task:
    """All that a worker needs to make one shard alone."""

    out: Folder
    build: str
    stem: str
    rows: Path  # of the plan
    digits: int
    samples: int


def reshard(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    samples_per_shard: int | None = None,
    shard_bytes: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    sample: str | int | float | None = None,
    processes: int | None = None,
    restart: bool = False,
    as_json: bool = False,
) -> Manifest:
    """Write the samples of `sources` (datasets, views, indexed tars) to the folder or URL `out` as new shards.

    A shard has `samples_per_shard` (1000) samples, or about `shard_bytes` bytes, counted as the samples lie in the
    sources. `sample` is a number of samples to draw, or a share of all (0.1, "10%"); `shuffle` puts them in an order that
    `seed` draws, else they stay in the sources' order. Keys are made anew; the old ones stay as `original_key`.

    A run that was cut short goes on; a finished one is left alone; `restart` removes what an earlier one wrote. Raises
    UserError for sources that cannot be used or have changed, and for a folder that holds something else.
    """
    processes, folder = choose_processes(processes), open_folder(out)
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: give at least 1")
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"--shard-bytes {shard_bytes}: give at least 1")
    if samples_per_shard is None and shard_bytes is None:
        samples_per_shard = 1000
    manifests = [Manifest.load(source) for source in sources]
    for manifest in manifests:
        if folder in (manifest.directory, manifest.tars, manifest.indexes):
            raise UserError(f"{folder}: is a source itself. Give another folder for the new shards")
    total = sum(manifest.samples for manifest in manifests)
    drawn = count_drawn(sample, total)
    options = {
        "command": "reshard",
        "sources": [manifest.fingerprint[:16] for manifest in manifests],
        "samples_per_shard": samples_per_shard,
        "shard_bytes": shard_bytes,
        "shuffle": shuffle,
        "seed": seed if shuffle or drawn < total else None,
        "sample": drawn if drawn < total else None,
    }
    folder.make()
    with folder.lock():
        state = load_state(folder, "reshard")
        if state is not None and restart:
            remove_run(folder, state)
            _remove_plan(folder)
            state = None
        if state is not None and is_finished(folder, state, options):
            manifest = Manifest.load(folder)
            _print(manifest, 0.0, as_json, finished_before=True)
            return manifest
        build = identify(options)
        with choose_plan_place(folder) as place:
            counts = _load_or_make_plan(manifests, place, build, options, drawn)
            stems = name_shards(len(counts))
            digits = max(4, len(str(max(counts) - 1)))
            prepare_folder(folder, stems, state, options)
            tasks = [
                _Task(folder, build, stem, _rows_of(place, number), digits, counts[number])
                for number, stem in enumerate(stems)
            ]
            started_s = time.monotonic()
            statistics, _ = make_shards(
                folder, build, stems, _make_shard, tasks, counts, processes, tell=lambda text: None
            )
            manifest = Manifest.of_shards(
                folder,
                [select_info(part) for part in statistics],
                build,
                captions=sum(part["captions"] for part in statistics),
                options=options,
            )
            manifest.write()
        _remove_plan(folder)
    manifest = Manifest.load(folder)
    _print(manifest, time.monotonic() - started_s, as_json)
    return manifest


def count_drawn(sample: str | int | float | None, total: int) -> int:
    """How many of `total` samples "5000", "0.1", "10%" or None ask for. Raises UserError."""
    if sample is None:
        return total
    text = str(sample).strip()
    number, percent = (text[:-1], 100) if text.endswith("%") else (text, 1)
    if re.fullmatch(r"\d+", text):
        count = int(text)
    elif re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number) and 0 < float(number) / percent <= 1:
        count = max(1, round(total * float(number) / percent))
    else:
        raise UserError(f"--sample {text}: give a number of samples (5000) or a share of all (0.1, 10%)")
    if not 1 <= count <= total:
        raise UserError(f"--sample {text}: give 1 to {total}, the samples that there are")
    return count


# The plan


def order_samples(total: int, drawn: int, shuffle: bool, seed: int) -> np.ndarray:
    """int64 [total]: where each sample goes in the new order, or -1 for one that is not drawn. A pure function."""
    if drawn < total:
        chosen = np.sort(np.argsort(_mix(seed, _SAMPLING, total), kind="stable")[:drawn])
    else:
        chosen = np.arange(total)
    if shuffle:
        chosen = chosen[np.argsort(_mix(seed, _SHUFFLING, total)[chosen], kind="stable")]
    ranks = np.full(total, -1, dtype=np.int64)
    ranks[chosen] = np.arange(len(chosen))
    return ranks


def _mix(seed: int, purpose: int, total: int) -> np.ndarray:
    """uint64 [total]: for each number a hash of seed, purpose and number; numpy's generators may change with versions.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), over a start that SHA-256 draws.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        value = np.arange(total, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def cut_shards(sizes: np.ndarray, samples_per_shard: int | None, shard_bytes: int | None) -> list[int]:
    """Samples of each shard: so many, or as many as fit into so many bytes, but at least one."""
    total = len(sizes)
    if shard_bytes is None:
        return [min(samples_per_shard, total - start) for start in range(0, total, samples_per_shard)]
    ends, counts, start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), [], 0
    while start < total:
        stop = int(np.searchsorted(ends, ends[start] + shard_bytes, side="right")) - 1
        stop = min(max(stop, start + 1), total)
        counts.append(stop - start)
        start = stop
    return counts


def _load_or_make_plan(
    manifests: Sequence[Manifest], place: Path, build: str, options: dict[str, Any], drawn: int
) -> list[int]:
    """Samples of each new shard; the plan's files are in `place` then. It is made once a run."""
    state, tars = place / "plan.json", [_locate(manifest.tars, "") for manifest in manifests]
    try:
        content = json.loads(state.read_bytes())
        if content["build"] == build and content["tars"] == tars:
            return content["counts"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    total = sum(manifest.samples for manifest in manifests)
    ranks = order_samples(total, drawn, options["shuffle"], options["seed"] or 0)
    sizes = np.zeros(drawn, dtype=np.int64)
    with connect(place / "work", RESHARD_MEMORY) as connection:
        rows = _Rows(connection)
        with open_progress_bar(sum(len(manifest.shards) for manifest in manifests), "sidecar") as report:
            first = 0
            for manifest in manifests:
                for number in range(len(manifest.shards)):
                    count = int(manifest.counts[number])
                    _collect(rows, manifest, number, ranks[first : first + count], sizes)
                    first += count
                    report(1)
        counts = cut_shards(sizes, options["samples_per_shard"], options["shard_bytes"])
        rows.write(place, counts)
    shutil.rmtree(place / "work")
    write_json_atomic(state, {"build": build, "tars": tars, "counts": counts})
    return counts


def _collect(rows: "_Rows", manifest: Manifest, number: int, ranks: np.ndarray, sizes: np.ndarray) -> None:
    """Add the samples of one source shard that are drawn to the plan."""
    import pyarrow

    drawn = ranks >= 0
    if not drawn.any():
        return
    shard, places, offsets = manifest.shards[number], manifest.places(number), manifest.load_index(number)
    starts, ends = offsets[places].astype(np.int64), offsets[places + 1].astype(np.int64)
    name = name_sidecar(shard.name)
    has_sidecar = manifest.indexes.size(name) is not None or manifest.tars.size(name) is not None
    table = (
        manifest.read_sidecar(number)
        if has_sidecar
        else pyarrow.table({"key": pyarrow.nulls(len(ranks), pyarrow.string())})
    )
    is_ours = {"offset", "size", "sha256"} <= set(table.column_names)
    dropped = [name for name in table.column_names if name in _MADE_ANEW or name in _PLAN]
    if not is_ours and "sha256" in table.column_names:
        dropped.append("sha256")  # of the picture as it was downloaded, not as it is stored
    table = _give_our_types(table.drop_columns(dropped))
    stem = shard.name.removesuffix(".tar")
    plan = {
        "_position": pyarrow.array(ranks, pyarrow.int64()),
        "_tar": pyarrow.array([_locate(manifest.tars, shard.name)] * len(ranks), pyarrow.string()),
        "_start": pyarrow.array(starts, pyarrow.int64()),
        "_end": pyarrow.array(ends, pyarrow.int64()),
        "_shown": pyarrow.array([stem if manifest.prefix_keys else None] * len(ranks), pyarrow.string()),
    }
    for column, values in plan.items():
        table = table.append_column(column, values)
    sizes[ranks[drawn]] = (ends - starts)[drawn]
    rows.add(table.filter(pyarrow.array(drawn)))


def _locate(folder: Folder, name: str) -> str:
    """Where a file is, from any working directory."""
    return str(folder.path.resolve() / name) if type(folder) is Folder else folder.locate(name)


def _give_our_types(table: "pyarrow.Table") -> "pyarrow.Table":
    """The table with our columns in our types; one that others fill otherwise goes, and is had from the sample."""
    import pyarrow

    for name, kind in list_sidecar_fields():
        if name not in table.column_names:
            continue
        number, column = table.column_names.index(name), table.column(name)
        try:
            if pyarrow.types.is_list(kind) and pyarrow.types.is_string(column.type):
                column = pyarrow.array([text and [text] for text in column.to_pylist()], kind)
            table = table.set_column(number, name, column.cast(kind))
        except pyarrow.ArrowException:
            table = table.remove_column(number)
    return table


class _Rows:
    """The rows of all sources in a database table that gets the columns of all."""

    def __init__(self, connection: "duckdb.DuckDBPyConnection") -> None:
        self._connection = connection
        self._types: dict[str, str] = {}  # column -> type; DuckDB's names are not case-sensitive

    def add(self, table: "pyarrow.Table") -> None:
        import pyarrow

        for number, name in enumerate(table.column_names):
            kind = table.column(number).type
            if kind == pyarrow.null():
                table = table.set_column(number, name, pyarrow.nulls(table.num_rows, pyarrow.string()))
        names = {name.lower(): name for name in table.column_names}
        if len(names) < table.num_columns:
            raise UserError(f"columns {', '.join(table.column_names)}: two differ in case only. Rename one")
        known = {name.lower(): name for name in self._types}
        table = table.rename_columns([known.get(name.lower(), name) for name in table.column_names])
        self._connection.register("part", table)
        found = {name: kind for name, kind, *_ in self._connection.execute("DESCRIBE part").fetchall()}
        if not self._types:
            self._connection.execute("CREATE TABLE samples AS SELECT * FROM part LIMIT 0")
            self._types = dict(found)
        for name, kind in found.items():
            if name not in self._types:
                self._connection.execute(f"ALTER TABLE samples ADD COLUMN {_quote(name)} {kind}")
                self._types[name] = kind
            elif self._types[name] != kind:
                common = _find_common_type(self._types[name], kind)
                if common != self._types[name]:
                    self._connection.execute(f"ALTER TABLE samples ALTER COLUMN {_quote(name)} TYPE {common}")
                    self._types[name] = common
        listed = ", ".join(_quote(name) for name in found)
        self._connection.execute(f"INSERT INTO samples ({listed}) SELECT {listed} FROM part")
        self._connection.unregister("part")

    def write(self, place: Path, counts: Sequence[int]) -> None:
        """Write the rows of each new shard, in their new order."""
        import pyarrow
        import pyarrow.parquet

        reader = self._connection.sql("SELECT * FROM samples ORDER BY _position").to_arrow_reader(_ROWS_AT_ONCE)
        number, left, writer = -1, 0, None
        try:
            for batch in reader:
                table, start = pyarrow.Table.from_batches([batch]), 0
                while start < table.num_rows:
                    if left == 0:
                        if writer:
                            writer.close()
                        number, left = number + 1, counts[number + 1]
                        writer = pyarrow.parquet.ParquetWriter(_rows_of(place, number), reader.schema)
                    part = table.slice(start, left)
                    writer.write_table(part)
                    start, left = start + part.num_rows, left - part.num_rows
        finally:
            if writer:
                writer.close()


_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
_NUMBERS = (*_INTEGERS, "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "FLOAT", "DOUBLE")


def _find_common_type(one: str, other: str) -> str:
    """The type of a column that two datasets have in different types."""
    if one in _INTEGERS and other in _INTEGERS:
        return max(one, other, key=_INTEGERS.index)
    return "DOUBLE" if one in _NUMBERS and other in _NUMBERS else "VARCHAR"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _rows_of(place: Path, number: int) -> Path:
    return place / f"{number:05d}.parquet"


def _remove_plan(folder: Folder) -> None:
    if type(folder) is Folder:
        shutil.rmtree(folder.path / PLAN_NAME, ignore_errors=True)


# Making the shards


class _Tars:
    """The source tars that a shard is made of, some of them open."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()

    def read(self, tar: str, start: int, end: int) -> dict[str, bytes]:
        """The files of one sample, by extension. Raises ShardError."""
        if tar not in self._open:
            parent, _, name = tar.rpartition("/")
            self._open[tar] = open_folder(parent or ".").open_ranges(name)
            if len(self._open) > _OPEN_TARS:
                self._open.popitem(last=False)
        self._open.move_to_end(tar)
        where = f"{tar}: the sample at bytes {start} to {end}"
        advice = "Put it into quarantine: python -m data_tools verify DIR --quarantine"
        data = self._open[tar].read(start, end)
        if len(data) < end - start:
            raise ShardError(f"{where}: the file ends after {len(data)} of {end - start} bytes. {advice}")
        try:
            members = parse_members(data)
        except TarError as error:
            raise ShardError(f"{where}: at byte {start + error.offset} {error.text}. {advice}") from None
        names = [split_name(name) for name in members if is_sample_file(name)]
        if len({key for key, _ in names}) != 1:
            raise ShardError(f"{where}: files of {len({key for key, _ in names})} keys, valid is one. {advice}")
        self.key = names[0][0]
        return {split_name(name)[1]: content for name, content in members.items() if is_sample_file(name)}


def _make_shard(task: _Task, report: Report) -> dict[str, Any]:
    """Write one shard's tar, index, sidecar and, last, its statistics; return the statistics."""
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(task.rows)
    schema = _make_schema(file.schema_arrow)
    tars, rows = _Tars(), []
    planned = (row for batch in file.iter_batches(_ROWS_AT_ONCE) for row in batch.to_pylist())
    with task.out.together() as out:
        with write_shard(out, f"{task.stem}.tar") as writer:
            for place, row in enumerate(planned):
                key = f"{task.stem}{place:0{task.digits}d}"
                fields = tars.read(row["_tar"], row["_start"], row["_end"])
                row, fields = _renew(row, fields, key, tars.key)
                try:
                    row["offset"], row["size"] = writer.add(key, fields)
                except ValueError as error:
                    where = f"{row['_tar']}: the sample at byte {row['_start']}"
                    raise UserError(f"{where}: {error}. Leave it out with a view") from None
                rows.append({name: value for name, value in row.items() if name not in _PLAN})
                report(1, size=row["size"])
        return complete_shard(out, writer.info, task.build, rows, schema, refused_captions={})


def _make_schema(planned: "pyarrow.Schema") -> "pyarrow.Schema":
    """Our columns, the old key, and what else the sources have."""
    import pyarrow

    own = [*list_sidecar_fields(), ("original_key", pyarrow.string())]
    names = {name for name, _ in own}
    others = [(part.name, part.type) for part in planned if part.name not in names and part.name not in _PLAN]
    return pyarrow.schema([*own, *others])


def _renew(
    row: dict[str, Any], fields: dict[str, bytes], key: str, tar_key: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The sidecar's row and the files of a sample under its new key. Raises ShardError for a damaged picture."""
    described = describe_sample(fields)
    if row.get("sha256") is not None and row["sha256"] != described.get("sha256"):
        raise ShardError(
            f"{row['_tar']}: the sample at bytes {row['_start']} to {row['_end']}: its picture is not the one of the "
            "sidecar. Put it into quarantine: python -m data_tools verify DIR --quarantine"
        )
    old_key = row.get("key")
    if old_key is None:
        old_key = tar_key if row["_shown"] is None else f"{row['_shown']}_{tar_key}"
    row = row | {name: value for name, value in described.items() if row.get(name) is None}
    row["captions"] = row["captions"] or []
    row |= {"key": key, "original_key": old_key, "status": "success"}
    picture = next((extension for extension in PICTURE_EXTENSIONS if extension in fields), None)
    try:
        content = json.loads(fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        content = fields["json"].decode("utf-8", "replace")
    content = content if isinstance(content, dict) else {"json": content}
    if not isinstance(content.get("captions"), list):
        content["captions"] = row["captions"]
    facts = ("source", "width", "height", "original_width", "original_height", "sha256")
    content |= {"key": key, "original_key": old_key}
    content |= {name: row[name] for name in facts if row.get(name) is not None}
    ordered = {picture: fields[picture]} if picture else {}
    if "txt" in fields or row["captions"]:
        ordered["txt"] = fields["txt"] if "txt" in fields else row["captions"][0].encode()
    ordered["json"] = json.dumps(content, ensure_ascii=False).encode()
    return row, ordered | {name: data for name, data in fields.items() if name not in ordered}


def _print(manifest: Manifest, elapsed_s: float, as_json: bool, finished_before: bool = False) -> None:
    facts = {
        "directory": str(manifest.directory),
        "samples": manifest.samples,
        "captions": manifest.captions,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "finished_before": finished_before,
    }
    if as_json:
        print(json.dumps(facts))
        return
    if finished_before:
        print(f"{manifest.directory}: this is finished already, with {manifest.samples} samples")
        return
    rate = f", {manifest.samples / max(elapsed_s, 1e-9):.0f} samples/s"
    size = format_bytes(manifest.bytes)
    print(f"{manifest.directory}: {manifest.samples} samples, {size} in {len(manifest.shards)} tars{rate}")
