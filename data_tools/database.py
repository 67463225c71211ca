"""DuckDB as the tools use it: within a limit to its memory, and on the disk beyond it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

PLAN_MEMORY = ("64MB", "256MB", "1GB")
"""Of a build's plan: the first is enough for any number of rows, but not for rows of tens of kilobytes each."""
RESHARD_MEMORY = "400MB"
VIEW_MEMORY = "1GB"
"""For expressions and joined tables that users choose."""


def connect(work: str | Path, memory: str, threads: int = 2, on_disk: bool = True) -> "duckdb.DuckDBPyConnection":
    """A new database within a limit of `memory`; it spills into the folder `work`, and lies there if it is `on_disk`."""
    import duckdb

    config = {"memory_limit": memory, "threads": threads, "temp_directory": str(Path(work) / "spill")}
    return duckdb.connect(str(Path(work) / "rows.duckdb") if on_disk else ":memory:", config=config)
