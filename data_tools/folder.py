"""A shard folder in the making: which run it holds, which of its shards are complete, and what may be removed.

build.json, written first, says which run the folder holds; a shard's statistics file, written last of its files, says
that the shard is complete; manifest.json, written last of all, says that the run is.
"""

import contextlib
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, Folder, format_bytes
from data_tools.shards import (
    CHECKSUMS_NAME,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    RETRY_NAME,
    SIZES_NAME,
    STATE_NAME,
    Manifest,
    ShardInfo,
    check_shard_files,
    sidecar_name,
    statistics_name,
)
from data_tools.workers import Report, Workers, open_progress_bar, run_tasks

if TYPE_CHECKING:
    import pyarrow

STATE_FORMAT = 1
PLAN_NAME = "plan.tmp"


def identify(options: Mapping[str, Any]) -> str:
    """A short name of a run: a hash of its options, which say what it is made of."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def name_shards(count: int) -> list[str]:
    """The stems of `count` shards: 00000, 00001, ..."""
    digits = max(5, len(str(count - 1)))
    return [f"{number:0{digits}d}" for number in range(count)]


def load_state(out: Folder, command: str = "build") -> dict[str, Any] | None:
    """What build.json says, or None for a folder without a run.

    Raises UserError for a folder of other things, and for one that another command than `command` is making.
    """
    try:
        content = out.read(STATE_NAME)
    except FileNotFoundError:
        foreign = [name for name in out.names() if not name.endswith(TEMPORARY_SUFFIX)]
        if foreign:
            raise UserError(
                f"{out}: holds files but no build (such as {min(foreign)}). Give an empty or a new folder"
            ) from None
        return None
    try:
        state = json.loads(content)
        known = state["format"] == STATE_FORMAT and isinstance(state["shards"], (int, list)) and state["options"]
        found = state["options"].get("command", "build") if known else None
    except (ValueError, KeyError, TypeError, AttributeError):
        found = None
    if found is None:
        where = out.locate(STATE_NAME)
        raise UserError(f"{where}: not the state of a build that this version knows. Give another folder")
    if found != command:
        raise UserError(f"{out}: holds what `{found}` wrote, which `{command}` leaves alone. Give another folder")
    return state


def is_finished(
    out: Folder, state: Mapping[str, Any], wanted: Mapping[str, Any], versions: Mapping[str, str] | None = None
) -> bool:
    """Whether this very run is complete: its options, and what else of `wanted` the state tells of, are the same.

    `versions` are those of the decoders and encoders: a folder that is not finished goes on with the same ones only.
    Raises UserError when the folder holds another run.
    """
    wanted, found = dict(wanted), {**state, **state["options"]}
    finished = out.size(MANIFEST_NAME) is not None
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
    out: Folder,
    stems: Sequence[str],
    state: Mapping[str, Any] | None,
    options: dict[str, Any],
    shared: bool = False,
    **facts: Any,
) -> None:
    """Check that no foreign tars lie where readers would take them for shards, clean up, and write build.json.

    `state` is what build.json says already, if it is there; `facts` are kept in it beside the options. In a folder that
    is `shared` with processes that make other shards, nothing is cleaned up.
    """
    own = list_own_files(stems)
    foreign = {name for name in out.names() if name.endswith(".tar")} - own
    if foreign:
        foreign -= {part["name"] for part in load_added_shards(out, stems, identify(options))} | set(_list_begun(out))
    if foreign:
        raise UserError(f"{out}: holds tars of another build (such as {min(foreign)}). Move them, or give a new folder")
    if not shared:
        remove_leftovers(out, own)
    if state is None:
        shards = len(stems) if list(stems) == name_shards(len(stems)) else list(stems)
        out.write_json(STATE_NAME, {"format": STATE_FORMAT, "shards": shards, **facts, "options": options})


@contextlib.contextmanager
def choose_plan_place(out: Folder) -> Iterator[Path]:
    """Where a run's plan lies: inside a local folder, to be shared by tasks and found again; else in a temporary one."""
    if type(out) is Folder:
        yield out.path / PLAN_NAME
        return
    with tempfile.TemporaryDirectory() as work:
        yield Path(work) / PLAN_NAME


def list_stems(state: Mapping[str, Any]) -> list[str]:
    """The stems of the shards of the run that build.json tells of."""
    shards = state["shards"]
    return name_shards(shards) if isinstance(shards, int) else list(shards)


def remove_run(out: Folder, state: Mapping[str, Any]) -> None:
    """Remove the files of the run that build.json tells of, and no others; build.json itself goes last."""
    retried = list_retried(out)
    stems = [*list_stems(state), *retried]
    if retried:  # the manifest, which tells of them, goes first
        out.write_json(RETRY_NAME, {"shards": [f"{stem}.tar" for stem in retried]})
    own, there = list_own_files(stems), set(out.names())
    last = {RETRY_NAME: 1, STATE_NAME: 2}
    for name in sorted(own & there, key=lambda name: (name != MANIFEST_NAME, last.get(name, 0), name)):
        out.remove(name)
    remove_leftovers(out, own)


def list_retried(out: Folder) -> list[str]:
    """The stems of shards that `retry` has added to the folder, or has begun to add."""
    names = _list_begun(out)
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        names += json.loads(out.read(MANIFEST_NAME))["options"].get("retried", [])
    return sorted({name.removesuffix(".tar") for name in names})


def _list_begun(out: Folder) -> list[str]:
    """The tars that a `retry` that has not finished is adding."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return list(json.loads(out.read(RETRY_NAME))["shards"])
    return []


def list_own_files(stems: Sequence[str]) -> set[str]:
    """The names that a run with these shards may write."""
    return {MANIFEST_NAME, SIZES_NAME, CHECKSUMS_NAME, STATE_NAME, RETRY_NAME, *list_shard_files(stems)}


def list_shard_files(stems: Sequence[str]) -> set[str]:
    return {stem + suffix for stem in stems for suffix in (".tar", ".tar" + INDEX_SUFFIX, ".parquet", "_stats.json")}


def remove_leftovers(out: Folder, own: set[str]) -> None:
    """Remove the temporary files of these names that a killed run has left."""
    for name in out.names():
        if name.endswith(TEMPORARY_SUFFIX) and name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in own:
            out.remove(name)


def load_finished_shards(out: Folder, stems: Sequence[str], build: str) -> list[dict[str, Any] | None]:
    """For each shard of the run `build`, its statistics if its files are all there, else None."""
    sizes = out.sizes()
    return [load_finished_shard(out, stem, build, sizes) if f"{stem}_stats.json" in sizes else None for stem in stems]


def load_finished_shard(
    out: Folder, stem: str, build: str, sizes: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The statistics of a shard of the run `build` if its files are all there, else None. `sizes` are those of `out`."""
    try:
        if sizes is None:
            found = {name: out.size(name) for name in list_shard_files([stem])}
            sizes = {name: size for name, size in found.items() if size is not None}
        statistics = json.loads(out.read(f"{stem}_stats.json"))
        info = select_info(statistics)
        check_shard_files(Manifest.of_shards(out, [info]), info, sizes, sizes)
    except (FileNotFoundError, ValueError, KeyError, TypeError, UserError):
        return None
    return statistics if statistics["build"] == build and sidecar_name(info.name) in sizes else None


def load_added_shards(out: Folder, stems: Sequence[str], build: str) -> list[dict[str, Any]]:
    """The statistics of the complete shards that `retry` has added to the run `build`, whose own are `stems`, in order."""
    sizes, own, added = out.sizes(), {f"{stem}_stats.json" for stem in stems}, []
    for name in sorted(name for name in sizes if name.endswith("_stats.json") and name not in own):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(out.read(name))["build"]
            statistics = load_finished_shard(out, name.removesuffix("_stats.json"), found, sizes)
            if found.startswith(f"{build}-") and statistics is not None:
                added.append(statistics)
    return added


def list_sidecar_fields() -> "list[tuple[str, pyarrow.DataType]]":
    """The columns that every sidecar of ours has; others of the input follow.

    A row for each input sample. `sha256` is that of the stored picture, `offset` and `size` say where the sample is in
    the tar.
    """
    import pyarrow

    text, number, long = pyarrow.string(), pyarrow.int32(), pyarrow.int64()
    types = {
        "key": text,
        "status": text,
        "error": text,
        "caption": text,
        "captions": pyarrow.list_(text),
        "width": number,
        "height": number,
        "original_width": number,
        "original_height": number,
        "sha256": text,
        "offset": long,
        "size": long,
        "source": text,
    }
    return list(types.items())


def write_sidecar(out: Folder, shard: str, rows: list[dict[str, Any]], schema: "pyarrow.Schema") -> str:
    """Write the .parquet of a shard and return its SHA-256; entries of a row that the schema lacks are left out.

    The statistics of the shard tell the hash, as `sidecar_sha256`, so that the manifest's writer need not read it again.
    """
    import pyarrow
    import pyarrow.parquet

    sidecar = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sidecar, compression="zstd")
    content = sidecar.getvalue().to_pybytes()
    out.write(sidecar_name(shard), content)
    return hashlib.sha256(content).hexdigest()


def complete_shard(
    out: Folder, info: ShardInfo, build: str, rows: list[dict[str, Any]], schema: "pyarrow.Schema", **facts: Any
) -> dict[str, Any]:
    """Write the sidecar of a shard and, last, its statistics, which say that it is complete; returns them.

    `rows` are for the sidecar, `facts` are what its statistics tell beside the usual.
    """
    sidecar_sha256 = write_sidecar(out, info.name, rows, schema)
    errors = [row["error"].partition(": ")[0] for row in rows if row["status"] != "success"]
    statistics = {
        **asdict(info),
        "build": build,
        "sidecar_sha256": sidecar_sha256,
        "failures": len(errors),
        "captions": sum(len(row["captions"] or ()) for row in rows if row["status"] == "success"),
        "failures_by_reason": count(errors),
        **facts,
    }
    out.write_json(statistics_name(info.name), statistics)
    return statistics


def make_shards(
    out: Folder,
    build: str,
    stems: Sequence[str],
    function: Callable[[Any, Report], dict[str, Any]],
    tasks: Sequence[Any],
    samples: Sequence[int],
    processes: int,
    workers: Workers | None = None,
    tell: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], int]:
    """Make those shards of the run that are not there yet, by `function(task, report)` in worker processes.

    `stems`, `tasks` and `samples` have an entry for each shard; `workers` may have been started before. Returns the
    statistics of all, and the number of samples that were tried now.
    """
    statistics = load_finished_shards(out, stems, build)
    waiting = [number for number, found in enumerate(statistics) if found is None]
    if len(waiting) < len(stems):
        tell(f"{out}: going on, {len(stems) - len(waiting)} of {len(stems)} shards are there already")
    tried = sum(samples[number] for number in waiting)
    with open_progress_bar(tried, "sample") as report:
        tasks = [tasks[number] for number in waiting]
        with contextlib.closing(run_tasks(function, tasks, processes, report, workers)) as made:
            for place, result in made:
                statistics[waiting[place]] = result
    return statistics, tried


def read_sidecar_rows(manifest: Manifest, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of all shards' sidecars in order, a shard at a time: of samples that count, and of a dataset's failures (a
    view has none). A column that a sidecar does not have is None. Raises UserError for a sidecar that is missing or cannot be read."""
    failures = manifest.directory == manifest.indexes
    for number in range(len(manifest.shards)):
        yield from manifest.read_sidecar(number, columns, failures, missing_ok=True).to_pylist()


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


def render_summary(manifest: Manifest, failures: Mapping[str, int], refusals: Mapping[str, int], rate: str = "") -> str:
    """The closing table of a build: what there is, and what could not be used, by reason."""
    lines = [
        str(manifest.directory),
        f"{'samples':<24}{manifest.samples:>14,}  {format_bytes(manifest.bytes)} in {len(manifest.shards)} tars",
        f"{'captions':<24}{manifest.captions:>14,}",
        *([f"{'rate':<24}{rate:>14}"] if rate else []),
    ]
    parts = (("failures", failures, "see the error column of the .parquet files"), ("captions refused", refusals, ""))
    for title, counts, hint in parts:
        if counts:
            lines.append(f"{title:<24}{sum(counts.values()):>14,}  {hint}".rstrip())
            lines += [f"  {reason:<37} {number:,}" for reason, number in sorted(counts.items(), key=lambda e: -e[1])]
    return "\n".join(lines)
