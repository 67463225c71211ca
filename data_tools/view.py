"""Selects samples by an SQL expression over the sidecars: a folder with a bit for each sample stands for a new dataset.

DuckDB evaluates the expression, a shard at a time, with no way to files, to the network or to anything of this process.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.database import VIEW_MEMORY, connect
from data_tools.errors import UserError, suggest
from data_tools.files import Folder, is_url, open_folder
from data_tools.shards import CHECKSUMS_NAME, MANIFEST_NAME, SELECTION_NAME, Manifest, Selection
from data_tools.workers import open_progress_bar

if TYPE_CHECKING:
    import duckdb
    import pyarrow

COMPUTED = ("caption_words", "caption_chars", "captions_count", "aspect", "shard", "place")
_ROWS_AT_ONCE = 100_000
_SHARDS_SHOWN = 10
_VIEW_FILES = {MANIFEST_NAME, SELECTION_NAME, CHECKSUMS_NAME}
_JOIN_KEYS = ("key", "sha256")

_STATUS_IS = re.compile(r"\b(status\s*(?:==?|!=|<>)\s*)'ok'(?!')", re.IGNORECASE)
_STATUS_IN = re.compile(r"\bstatus\s+(?:not\s+)?in\s*\([^()]*\)", re.IGNORECASE)


def make_view(
    directory: str | Path,
    out: str | Path,
    where: str,
    join: Sequence[str] = (),
    restart: bool = False,
    as_json: bool = False,
) -> Manifest:
    """Write the view `out` of the samples of a dataset or view for which the expression `where` is true.

    Its columns are those of the sidecars, COMPUTED, and those of the parquet files `join`, whose rows are found by `key`
    or by `sha256`; a name that is taken already gets the file's name before it. `status` is 'success' or 'ok'.

    Raises UserError for an expression that cannot be evaluated, a joined file that does not fit, a folder that holds
    something else, and when no sample remains.
    """
    manifest = Manifest.load(directory)
    folder = open_folder(out)
    if not where.strip():
        raise UserError("--where: the expression is empty. Give one, such as: width >= 256")
    options = {"command": "view", "where": where, "join": [Path(file).name for file in join]}
    _check_out(folder, manifest, restart)
    with tempfile.TemporaryDirectory() as work, connect(work, VIEW_MEMORY, on_disk=False) as connection:
        selection, captions = _select(connection, manifest, _accept_ok(where), [str(file) for file in join])
    remaining = int(selection.counts.sum())
    if remaining == 0:
        raise UserError(f"{manifest.directory}: not one of {manifest.samples} samples is left by {_name(where)}")
    folder.make()
    folder.remove(MANIFEST_NAME)  # so that a view that is replaced is one or the other, never between
    manifest.write_view(folder, selection, captions, options)
    view = Manifest.load(folder)
    _print(manifest, view, as_json)
    return view


def _check_out(folder: Folder, manifest: Manifest, restart: bool) -> None:
    """Refuse a folder with anything but an unfinished view, or with a finished one unless it is to be replaced."""
    if folder in (manifest.directory, manifest.indexes, manifest.tars):
        raise UserError(f"{folder}: is the dataset itself. Give a folder of its own for the view")
    names = {name for name in folder.names() if not name.endswith(".tmp")}
    if MANIFEST_NAME in names:
        try:
            is_view = "view" in json.loads(folder.read(MANIFEST_NAME))
        except (ValueError, TypeError):
            is_view = False
        if not is_view:
            raise UserError(f"{folder}: holds a dataset that is no view. Give another folder")
        if not restart:
            raise UserError(f"{folder}: holds a view already. Give another folder, or --restart to replace it")
    elif names - _VIEW_FILES:
        raise UserError(f"{folder}: holds files but no view (such as {min(names)}). Give an empty or a new folder")


def _accept_ok(where: str) -> str:
    """The expression with 'success' for 'ok' where it is compared with `status`."""
    where = _STATUS_IN.sub(lambda match: match.group().replace("'ok'", "'success'"), where)
    return _STATUS_IS.sub(r"\1'success'", where)


def _select(
    connection: "duckdb.DuckDBPyConnection", manifest: Manifest, where: str, join: Sequence[str]
) -> tuple[Selection, int]:
    """The samples for which the expression is true, and the number of their captions."""
    joined = [_load_join(connection, number, file) for number, file in enumerate(join)]
    for setting in (
        "enable_external_access = false",
        "python_enable_replacements = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    masks, captions = [], 0
    with open_progress_bar(len(manifest.shards), "shard") as report:
        for numbers, table in _read_sidecars(manifest):
            keep = np.zeros(0, dtype=bool) if table is None else _evaluate(connection, table, joined, where)
            if table is not None:
                captions += int(table.column("captions_count").to_numpy()[keep].sum())
            ends = np.cumsum(manifest.counts[numbers])
            for number, part in zip(numbers, np.split(keep, ends[:-1]), strict=True):
                mask = np.zeros(manifest.shards[number].samples, dtype=bool)
                mask[manifest.places(number)[part]] = True
                masks.append(mask)
                report(1)
    return Selection.of_masks(masks), captions


def _read_sidecars(manifest: Manifest) -> Iterator[tuple[list[int], "pyarrow.Table | None"]]:
    """The numbers of some shards and the rows of all of them, for some 100,000 rows at a time; None for no rows."""
    import pyarrow

    numbers: list[int] = []
    tables: list[pyarrow.Table] = []
    for number, shard in enumerate(manifest.shards):
        numbers.append(number)
        if manifest.counts[number]:
            tables.append(_add_computed(manifest.read_sidecar(number), shard.name, manifest.places(number)))
        if sum(table.num_rows for table in tables) >= _ROWS_AT_ONCE or number == len(manifest.shards) - 1:
            try:
                yield numbers, pyarrow.concat_tables(tables, promote_options="permissive") if tables else None
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
                where = f"{manifest.indexes.locate(shard.name)} and those before it"
                raise UserError(f"{where}: the sidecars have columns of different types: {error}") from None
            numbers, tables = [], []


def _add_computed(table: "pyarrow.Table", shard: str, places: np.ndarray) -> "pyarrow.Table":
    """The sidecar's rows with the columns COMPUTED; columns of the sidecar that have such a name give way."""
    import pyarrow

    rows, names = table.num_rows, set(table.column_names)
    texts = table.column("caption").to_pylist() if "caption" in names else [None] * rows
    lists = table.column("captions").to_pylist() if "captions" in names else [text and [text] for text in texts]
    sizes = [table.column(name).to_pylist() if name in names else [None] * rows for name in ("width", "height")]
    computed = {
        "caption_words": pyarrow.array([len((text or "").split()) for text in texts], pyarrow.int64()),
        "caption_chars": pyarrow.array([len(text or "") for text in texts], pyarrow.int64()),
        "captions_count": pyarrow.array([len(part or ()) for part in lists], pyarrow.int64()),
        "aspect": pyarrow.array(
            [width / height if width and height else None for width, height in zip(*sizes, strict=True)],
            pyarrow.float64(),
        ),
        "shard": pyarrow.array([shard] * rows, pyarrow.string()),
        "place": pyarrow.array(places, pyarrow.int64()),
    }
    table = table.drop_columns([name for name in computed if name in names])
    for name, column in computed.items():
        table = table.append_column(name, column)
    return table


class _Join:
    """A joined file as a table of the database."""

    def __init__(self, table: str, file: str, key: str, columns: list[str]) -> None:
        self.table, self.file, self.key, self.columns = table, file, key, columns
        self.prefix = re.sub(r"\W", "_", Path(file).stem)


def _load_join(connection: "duckdb.DuckDBPyConnection", number: int, file: str) -> _Join:
    """Load a parquet file through pyarrow, row group by row group; its keys must be unique. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        if is_url(file):
            parent, _, name = file.rpartition("/")
            source: Any = pyarrow.BufferReader(open_folder(parent).read(name))
        else:
            source = file
        parquet = pyarrow.parquet.ParquetFile(source)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file. Give a parquet file with a column key or sha256 as --join") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not readable as parquet: {error}") from None
    names = parquet.schema_arrow.names
    key = next((name for name in _JOIN_KEYS if name in names), None)
    if key is None:
        raise UserError(f"{file}: has neither a column key nor sha256 to join by. Its columns are: {', '.join(names)}")
    table = f"join_{number}"
    columns = [name for name in names if name != key and name not in _JOIN_KEYS]
    reader = pyarrow.RecordBatchReader.from_batches(parquet.schema_arrow, parquet.iter_batches(_ROWS_AT_ONCE))
    connection.register("batches", reader)
    listed = ", ".join([f"{_quote(key)}::VARCHAR AS {_quote(key)}", *map(_quote, columns)])
    connection.execute(
        f"CREATE TABLE {table} AS SELECT {listed} FROM batches WHERE {_quote(key)} IS NOT NULL ORDER BY 1"
    )
    connection.unregister("batches")
    twice = connection.execute(
        f"SELECT {_quote(key)}, count(*) FROM {table} GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
    ).fetchone()
    if twice:
        raise UserError(f"{file}: {key} {twice[0]} has {twice[1]} rows. Give a file with one row for each {key}")
    return _Join(table, file, key, columns)


def _evaluate(
    connection: "duckdb.DuckDBPyConnection", table: "pyarrow.Table", joined: Sequence[_Join], where: str
) -> np.ndarray:
    """bool [rows]: whether the expression is true of each row. Raises UserError."""
    import duckdb
    import pyarrow
    import pyarrow.compute

    names, ambiguous, parts, tables = list(table.column_names), {}, ["s.*"], ["samples AS s"]
    if "key" not in names and any(join.key == "key" for join in joined):
        raise UserError(f"{joined[0].file}: to be joined by key, but the sidecars have no column key")
    taken = {name.lower() for name in names}
    counts: dict[str, list[str]] = {}
    for join in joined:
        for column in join.columns:
            counts.setdefault(column.lower(), []).append(f"{join.prefix}_{column}")
    for join in joined:
        if join.key not in names:
            raise UserError(f"{join.file}: to be joined by {join.key}, which the sidecars have not")
        ends = pyarrow.compute.min_max(table.column(join.key)).as_py()  # it is sorted: most of it need not be looked at
        key, least, greatest = _quote(join.key), _quote_text(ends["min"]), _quote_text(ends["max"])
        part = f"(SELECT * FROM {join.table} WHERE {key} BETWEEN {least} AND {greatest})"
        tables.append(f"LEFT JOIN {part} AS {join.table} ON s.{key} = {join.table}.{key}")
        for column in join.columns:
            name = column
            if column.lower() in taken or len(counts[column.lower()]) > 1:
                name = f"{join.prefix}_{column}"
                if column.lower() not in taken:
                    ambiguous[column.lower()] = counts[column.lower()]
            names.append(name)
            parts.append(f"{join.table}.{_quote(column)} AS {_quote(name)}")
    for number, name in enumerate(table.column_names):
        if table.column(number).type == pyarrow.null():  # which no operator takes
            table = table.set_column(number, name, pyarrow.nulls(table.num_rows, pyarrow.string()))
    row = "row_of_the_sidecars"
    table = table.append_column(row, [np.arange(table.num_rows)])
    connection.register("samples", table)
    sql = (
        f"SELECT {row} AS number, CAST((\n{where}\n) AS BOOLEAN) AS keep "
        f"FROM (SELECT {', '.join(parts)} FROM {' '.join(tables)})"
    )
    try:
        if len(connection.extract_statements(sql)) != 1:
            raise UserError(f"{_name(where)}: not one expression. Give one, such as: width >= 256")
        found = connection.execute(sql).fetchnumpy()
    except duckdb.Error as error:
        raise _explain(where, str(error), names, ambiguous) from None
    finally:
        connection.unregister("samples")
    numbers = np.asarray(found["number"])
    if sorted(numbers.tolist()) != list(range(table.num_rows)):
        raise UserError(f"{_name(where)}: not one expression. Give one, such as: width >= 256")
    keep = np.zeros(table.num_rows, dtype=bool)
    keep[numbers] = np.ma.filled(found["keep"], False).astype(bool)
    return keep


def _explain(where: str, text: str, names: Sequence[str], ambiguous: Mapping[str, Sequence[str]]) -> UserError:
    """The first line of DuckDB's answer, and what would be right."""
    line = text.strip().splitlines()[0].rstrip(".!")
    unknown = re.search(r'column "([^"]+)" not found', line)
    hint = ""
    if unknown:
        column = unknown.group(1)
        line = f"no column '{column}'"
        hint = suggest(column, names)
        if column.lower() in ambiguous:
            line = f"column '{column}' is in several of the joined files"
            hint = f" Write {' or '.join(ambiguous[column.lower()])}."
    return UserError(f"{_name(where)}: {line}.{hint} The columns are: {', '.join(names)}")


def _name(where: str) -> str:
    """The expression, on one line."""
    return f'--where "{" ".join(where.split())}"'


def _quote_text(text: str | None) -> str:
    return "NULL" if text is None else "'" + text.replace("'", "''") + "'"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _print(source: Manifest, view: Manifest, as_json: bool) -> None:
    counts = {shard.name: int(count) for shard, count in zip(view.shards, view.counts, strict=True)}
    if as_json:
        facts = {"directory": str(view.directory), "of": source.samples, "samples": view.samples}
        print(json.dumps(facts | {"captions": view.captions, "shards": counts}, ensure_ascii=False))
        return
    share = view.samples / source.samples
    print(
        f"{view.directory}: {view.samples} of {source.samples} samples remain ({share:.1%}), {view.captions} captions"
    )
    for (name, count), before in list(zip(counts.items(), source.counts, strict=True))[:_SHARDS_SHOWN]:
        print(f"  {name}  {count} of {before}")
    if len(counts) > _SHARDS_SHOWN:
        numbers = list(counts.values())
        print(
            f"  ... {len(counts)} shards: min {min(numbers)}, median {np.median(numbers):.0f}, max {max(numbers)}, "
            f"{numbers.count(0)} with none"
        )
