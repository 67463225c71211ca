"""DuckDB as the tools use it: within a limit to its memory, and on the disk beyond it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

LIMITS = {
    "plan": {"memory_limit": "128MB", "threads": 1},
    "reshard": {"memory_limit": "400MB", "threads": 2},
    "view": {"memory_limit": "1GB", "threads": 2},  # of expressions and joined tables that users choose
}


def connect(work: str | Path, use: str, on_disk: bool = True) -> "duckdb.DuckDBPyConnection":
    """A new database for one of the uses in LIMITS; it spills into the folder `work`, and lies there if it is `on_disk`."""
    import duckdb

    place = str(Path(work) / "rows.duckdb") if on_disk else ":memory:"
    return duckdb.connect(place, config={**LIMITS[use], "temp_directory": str(Path(work) / "spill")})
