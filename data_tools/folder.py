"""A shard folder in the making: which run it holds, which of its shards are complete, and what may be removed.

build.json, written first, says which run the folder holds; a shard's statistics file, written last of its files, says
that the shard is complete; manifest.json, written last of all, says that the run is.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, write_atomic, write_json_atomic
from data_tools.shards import INDEX_SUFFIX, MANIFEST_NAME, SIZES_NAME, Manifest, ShardInfo, check_shard_files

STATE_NAME = "build.json"
STATE_FORMAT = 1


def identify(options: Mapping[str, Any]) -> str:
    """A short name of a run: a hash of its options, which say what it is made of."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def name_shards(count: int) -> list[str]:
    """The stems of `count` shards: 00000, 00001, ..."""
    digits = max(5, len(str(count - 1)))
    return [f"{number:0{digits}d}" for number in range(count)]


def load_state(out: Path, command: str = "build") -> dict[str, Any] | None:
    """What build.json says, or None for a folder without a run.

    Raises UserError for a folder of other things, and for one that another command than `command` is making.
    """
    path = out / STATE_NAME
    if path.exists():
        try:
            state = json.loads(path.read_bytes())
            known = state["format"] == STATE_FORMAT and isinstance(state["shards"], (int, list)) and state["options"]
            found = state["options"].get("command", "build") if known else None
        except (ValueError, KeyError, TypeError, AttributeError):
            found = None
        if found is None:
            raise UserError(f"{path}: not the state of a build that this version knows. Give another folder")
        if found != command:
            raise UserError(f"{out}: holds what `{found}` wrote, which `{command}` leaves alone. Give another folder")
        return state
    foreign = [name for name in os.listdir(out) if not name.endswith(TEMPORARY_SUFFIX)]
    if foreign:
        raise UserError(f"{out}: holds files but no build (such as {min(foreign)}). Give an empty or a new folder")
    return None


def is_finished(
    out: Path, state: Mapping[str, Any], wanted: Mapping[str, Any], versions: Mapping[str, str] | None = None
) -> bool:
    """Whether this very run is complete: its options, and what else of `wanted` the state tells of, are the same.

    `versions` are those of the decoders and encoders: a folder that is not finished goes on with the same ones only.
    Raises UserError when the folder holds another run.
    """
    wanted, found = dict(wanted), {**state, **state["options"]}
    finished = (out / MANIFEST_NAME).exists()
    if not finished:
        wanted |= versions or {}
    differences = [f"{key} {found.get(key)}, not {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
    if differences:
        raise UserError(
            f"{out}: holds a build with {'; '.join(differences)}. Give the same, another folder, or --restart to "
            "remove it and begin anew"
        )
    return finished


def prepare_folder(
    out: Path, stems: Sequence[str], state: Mapping[str, Any] | None, options: dict[str, Any], **facts: Any
) -> None:
    """Check that no foreign tars lie where readers would take them for shards, clean up, and write build.json.

    `state` is what build.json says already, if it is there; `facts` are kept in it beside the options.
    """
    own = _list_own_files(stems)
    foreign = [name for name in os.listdir(out) if name.endswith(".tar") and name not in own]
    if foreign:
        raise UserError(f"{out}: holds tars of another build (such as {min(foreign)}). Move them, or give a new folder")
    _remove_leftovers(out, own)
    if state is None:
        shards = len(stems) if list(stems) == name_shards(len(stems)) else list(stems)
        write_json_atomic(out / STATE_NAME, {"format": STATE_FORMAT, "shards": shards, **facts, "options": options})


def remove_run(out: Path, state: Mapping[str, Any]) -> None:
    """Remove the files of the run that build.json tells of, and no others; build.json itself goes last."""
    shards = state["shards"]
    own = _list_own_files(name_shards(shards) if isinstance(shards, int) else shards)
    for name in sorted(own, key=lambda name: (name != MANIFEST_NAME, name == STATE_NAME)):
        (out / name).unlink(missing_ok=True)
    _remove_leftovers(out, own)


def _list_own_files(stems: Sequence[str]) -> set[str]:
    """The names that a run with these shards may write."""
    suffixes = (".tar", ".tar" + INDEX_SUFFIX, ".parquet", "_stats.json")
    return {MANIFEST_NAME, SIZES_NAME, STATE_NAME, *(stem + suffix for stem in stems for suffix in suffixes)}


def _remove_leftovers(out: Path, own: set[str]) -> None:
    """Remove the temporary files that a killed run has left."""
    for name in os.listdir(out):
        if name.endswith(TEMPORARY_SUFFIX) and name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in own:
            (out / name).unlink()


def load_finished_shard(out: Path, stem: str, build: str) -> dict[str, Any] | None:
    """The statistics of a shard of the run `build` whose files are all there, else None."""
    try:
        statistics = json.loads((out / f"{stem}_stats.json").read_bytes())
        check_shard_files(out, select_info(statistics))
    except (FileNotFoundError, ValueError, KeyError, TypeError, UserError):
        return None
    complete = statistics["build"] == build and (out / f"{stem}.parquet").exists()
    return statistics if complete else None


def write_sidecar(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema) -> None:
    """Write a shard's .parquet; entries of a row that the schema does not have are left out."""
    sidecar = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sidecar, compression="zstd")
    write_atomic(path, sidecar.getvalue().to_pybytes())


def read_sidecar_rows(
    manifest: Manifest, columns: Sequence[str] | None = None, batch_rows: int = 1024
) -> Iterator[dict[str, Any]]:
    """The rows of all shards' sidecars in order, in constant memory; of `columns`, those that a sidecar has.

    Raises UserError for a shard without a sidecar, or with one that cannot be read.
    """
    for shard in manifest.shards:
        with open_sidecar(manifest, shard) as file:
            names = file.schema_arrow.names
            chosen = None if columns is None else [name for name in columns if name in names]
            for batch in file.iter_batches(batch_rows, columns=chosen):
                yield from batch.to_pylist()


def open_sidecar(manifest: Manifest, shard: ShardInfo) -> pyarrow.parquet.ParquetFile:
    """The shard's .parquet, open. Raises UserError when it is not there or not readable."""
    path = manifest.directory / f"{Path(shard.name).stem}.parquet"
    try:
        return pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: this sidecar is missing. Restore it from a copy, or build again") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not readable ({error}). Restore it from a copy, or build again") from None


def select_info(statistics: Mapping[str, Any]) -> ShardInfo:
    """What the manifest lists of a shard, out of its statistics."""
    return ShardInfo(**{part.name: statistics[part.name] for part in fields(ShardInfo)})


def count(reasons: Iterable[str]) -> dict[str, int]:
    """How often each occurs, sorted by name."""
    return dict(sorted(Counter(reasons).items()))


def add_counts(parts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sums of counts by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
