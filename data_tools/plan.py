"""The plan of a build: the rows of any source, grouped by picture, put in order and cut into shards.

The grouping and sorting is DuckDB's, which works within a limit of memory and on disk beyond it: three million
rows take as much memory as one million. A plan is a folder with a parquet file for each shard (the rows of its
samples, in order) and plan.json, written last; any process can then make any shard alone.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_tools.database import PLAN_MEMORY, connect
from data_tools.errors import UserError
from data_tools.files import lock_folder, write_json_atomic
from data_tools.sources import Row, Source

STATE_NAME = "plan.json"
ROWS_AT_ONCE = 20_000
_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in Row._fields])
_NAMES_SHOWN = 3
_DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "failed to offload data block")
"""What DuckDB's errors, of several kinds, say where the disk is full, or would be."""
_MEMORY_FULL = re.compile(r"\(\S+ \S+/\S+ \S+ used\)")
"""And where the limit of memory is met, with nothing left that could go to the disk: (61.0 MiB/61.0 MiB used)."""


@dataclass(slots=True)
class Sample:
    """One picture of the input: its captions and refusals in input order, the other columns, and where it lies."""

    source: str
    captions: list[str]
    refusals: list[str]
    extra: str
    place: str


@dataclass(frozen=True)
class Plan:
    folder: Path
    samples: int
    samples_per_shard: int

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def count(self, number: int) -> int:
        """Samples of shard `number`."""
        return min(self.samples_per_shard, self.samples - number * self.samples_per_shard)

    def path(self, number: int) -> Path:
        """The parquet file of shard `number`."""
        return self.folder / f"{number:05d}.parquet"


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of one shard of a plan, in order."""
    rows = (
        Row(**row)
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE)
        for row in batch.to_pylist()
    )
    for image, group in groupby(rows, key=lambda row: row.image):
        rows_of_image = list(group)
        captions = [row.caption for row in rows_of_image if not row.refusal]
        refusals = [row.refusal for row in rows_of_image if row.refusal]
        yield Sample(image, captions, refusals, rows_of_image[0].extra, rows_of_image[0].place)


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write samples, each with a caption, as `read_samples` reads them."""
    rows = [Row(s.source, caption, "", s.extra, s.place) for s in samples for caption in s.captions]
    pyarrow.parquet.write_table(_to_table(rows), path)


def load_or_make_plan(
    source: Source, folder: Path, build: str, samples_per_shard: int, seed: int | None, keep: set[str] | None
) -> Plan:
    """The plan of `build` in `folder`; made if it is not there, by one of the processes that ask for it at once.

    Raises UserError for input without a row, with none of the names of `keep`, or that has changed on the way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, wait=True):
        path = folder / STATE_NAME
        with contextlib.suppress(FileNotFoundError, ValueError):
            state = json.loads(path.read_bytes())
            if state["build"] == build:
                return Plan(folder, state["samples"], samples_per_shard)
        path.unlink(missing_ok=True)  # first, for a plan of which a part has gone must not look whole
        for old in folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        plan = _make_plan(source, folder, samples_per_shard, seed, keep)
        source.check_unchanged()  # since its identity, and so the name of the build, was found
        write_json_atomic(path, {"build": build, "samples": plan.samples})
        return plan


def remove_plan(folder: Path) -> None:
    """Remove the plan in `folder`, if there is one."""
    (folder / STATE_NAME).unlink(missing_ok=True)  # see above
    shutil.rmtree(folder, ignore_errors=True)


def _make_plan(source: Source, folder: Path, samples_per_shard: int, seed: int | None, keep: set[str] | None) -> Plan:
    import duckdb

    work = folder / "work"
    for memory in PLAN_MEMORY:
        work.mkdir()
        try:
            with connect(work, memory, threads=1) as connection:
                _collect_rows(connection, source)
                _check_names(connection, source, keep)
                plan = Plan(folder, _order_samples(connection, source, seed, keep), samples_per_shard)
                _write_shards(connection, plan)
                return plan
        except duckdb.Error as error:
            if any(words in str(error) for words in _DISK_FULL):
                raise OSError(errno.ENOSPC, "the plan cannot be written", str(work)) from None
            if not _MEMORY_FULL.search(str(error)):
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise UserError(
        f"{source}: its rows are so long that they cannot be put in order in {PLAN_MEMORY[-1]} of memory. Shorten the "
        "captions, or keep fewer columns with --keep-columns"
    )


def _collect_rows(connection: Any, source: Source) -> None:
    connection.execute(
        "CREATE TABLE rows (number BIGINT, image VARCHAR, caption VARCHAR, refusal VARCHAR, extra VARCHAR, place VARCHAR)"
    )
    done = 0
    for batch in _batches(source.rows()):
        connection.register("batch", batch)
        names = ", ".join(Row._fields)
        connection.execute(f"INSERT INTO rows SELECT {done} + row_number() OVER () - 1, {names} FROM batch")
        connection.unregister("batch")
        done += len(batch)


def _batches(rows: Iterator[Row]) -> Iterator[pyarrow.Table]:
    """The rows as tables, cut by number and by bytes, for captions may be long."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.caption) + len(row.extra)
        if len(part) >= ROWS_AT_ONCE or size > 2**24:
            yield _to_table(part)
            part, size = [], 0
    if part:
        yield _to_table(part)


def _to_table(rows: list[Row]) -> pyarrow.Table:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pyarrow.Table.from_arrays([pyarrow.array(column, pyarrow.string()) for column in columns], schema=_SCHEMA)


def _check_names(connection: Any, source: Source, keep: set[str] | None) -> None:
    """Refuse an empty input; tell of names to keep that are not in it."""
    if connection.execute("SELECT count(*) FROM rows").fetchall()[0][0] == 0:
        raise UserError(f"{source}: no rows. Give a table with a header and one row a caption")
    connection.execute("CREATE TABLE keep (image VARCHAR)")
    if keep is None:
        return
    connection.register("names", pyarrow.table({"image": sorted(keep)}))
    connection.execute("INSERT INTO keep SELECT image FROM names")
    absent = [
        name
        for (name,) in connection.execute(
            "SELECT image FROM keep WHERE image NOT IN (SELECT image FROM rows) ORDER BY image"
        ).fetchall()
    ]
    if len(absent) == len(keep):
        raise UserError(f"{source}: none of the {len(keep)} names of --keep-list (first: {absent[0]}). Check both")
    if absent:
        shown = ", ".join(absent[:_NAMES_SHOWN])
        text = f"warning: {source}: {len(absent)} of {len(keep)} names of --keep-list are not in it (first: {shown})"
        print(text, file=sys.stderr)


def _order_samples(connection: Any, source: Source, seed: int | None, keep: set[str] | None) -> int:
    """Number the samples: in the order of their first rows, or by a hash of seed and name, which is a pure function.

    Pictures inside parquet files are shuffled by row group and then within it, for one can only be read with its group.
    """
    order = "min(number)"
    if seed is not None:
        order = f"sha256('{int(seed)}/' || image)"
        if source.reads_by_group:
            group = "regexp_replace(any_value(place), '/[^/]*$', '')"
            order = f"sha256('{int(seed)}/' || {group}), {order}"
    where = "" if keep is None else "WHERE image IN (SELECT image FROM keep)"
    connection.execute(
        f"CREATE TABLE samples AS SELECT image, row_number() OVER (ORDER BY {order}, image) - 1 AS sample "
        f"FROM rows {where} GROUP BY image"
    )
    return connection.execute("SELECT count(*) FROM samples").fetchall()[0][0]


def _write_shards(connection: Any, plan: Plan) -> None:
    """Write the parquet file of each shard."""
    names = ", ".join(Row._fields)
    ordered = connection.sql(
        f"SELECT (sample // {plan.samples_per_shard})::BIGINT AS shard, {names} FROM rows JOIN samples USING (image) "
        "ORDER BY sample, number"
    )
    reader = ordered.to_arrow_reader(ROWS_AT_ONCE)
    current, writer = -1, None
    try:
        for batch in reader:
            numbers = batch.column("shard").to_numpy()
            part = pyarrow.table({name: batch.column(name) for name in Row._fields}, schema=_SCHEMA)
            start = 0
            while start < len(numbers):
                number = int(numbers[start])
                end = int(numbers.searchsorted(number, side="right"))
                if number != current:
                    if writer:
                        writer.close()
                    current, writer = number, pyarrow.parquet.ParquetWriter(plan.path(number), _SCHEMA)
                writer.write_table(part.slice(start, end - start))
                start = end
    finally:
        if writer:
            writer.close()
