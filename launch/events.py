"""What happened to a run's jobs, one JSON object a line in RUN/launch/events.jsonl.

Each has `time` (unix seconds, when it was noticed) and `event`. docs/launch.md lists the events. What happened in the run
itself is in RUN/events.jsonl.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

FOLDER = "launch"
EVENTS = "events.jsonl"


def append_event(run: str | Path, event: str, **facts: Any) -> None:
    """Append one event, in one write, so that lines of several writers never mix. `time` may be among the facts."""
    from data_tools.files import append_json_line  # here: a command that writes nothing starts without it

    path = Path(run) / FOLDER / EVENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    append_json_line(path, {"time": time.time(), "event": event, **facts})


def read_launch_events(run: str | Path) -> list[dict[str, Any]]:
    """All events in the order in which they were written, without lines that a crash cut short; none for no file."""
    return read_lines(Path(run) / FOLDER / EVENTS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line, without lines that were cut short; none for no file."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found
