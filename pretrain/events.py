"""What happened in a run, one JSON object a line in RUN/events.jsonl, and the wall time booked from it.

Every event has `time` (unix seconds), `event` and `step`. Rank 0 writes; a rank that has to tell what happened when rank 0
cannot writes a file of its own, events.rank-00003.jsonl, and `read_events` reads all of them.
"""

import contextlib
import errno
import fcntl
import heapq
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from data_tools.files import append_json_line

if TYPE_CHECKING:  # `python -m launch report` reads events without torch
    from pretrain.world import World

EVENTS = "events.jsonl"
LOCK = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # Lustre that is mounted without says the first

log = logging.getLogger(__name__)


class Events:
    """Appends events. Each is one write to a file opened for appending, so lines never mix."""

    def __init__(self, run: str | Path, rank: int = 0) -> None:
        self.path = Path(run) / (EVENTS if rank == 0 else f"events.rank-{rank:05d}.jsonl")

    def log(self, event: str, step: int, **facts: Any) -> None:
        append_json_line(self.path, {"time": time.time(), "event": event, "step": step, **facts})


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """All events of a run in the order in which they were written, without lines that a crash cut short or that say
    nothing."""
    stories = []
    for path in sorted(Path(run).glob("events*.jsonl")):
        stories.append([])
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                stories[-1].append({**event, "time": float(event["time"]), "event": str(event["event"])})
    # A clock that was set back must not turn a story round: those of other ranks are put in between, by time.
    return list(heapq.merge(*stories, key=lambda event: event["time"]))


class RunTaken(Exception):
    """Another life of the run has taken the folder over: this one, thought dead, must not write into it any more."""


class RunLock:
    """This life's hold of the run folder: on rank 0's node a lock on run.lock, which goes with the process; on all nodes
    the words in it, which say whose it is.

    A launcher that has given a life up, though one of its processes may still be there (frozen, or on a node that is cut
    off), removes the file before it starts the next. The next life writes words of its own into a new one, and what is
    left of the old life finds them and ends.
    """

    def __init__(self, path: Path, words: str) -> None:
        self.path, self.words = path, words

    def check(self) -> None:
        """Raises RunTaken if another life holds the folder."""
        try:
            found = self.path.read_text()
        except OSError:  # removed, and nobody has taken it yet
            return
        if found and found != self.words:  # it is empty for an instant after it is made
            raise RunTaken(f"{self.path.parent}: taken over by another life of this run ({found}); this one ends")


@contextlib.contextmanager
def lock_run(run: str | Path, world: "World") -> Iterator[RunLock]:
    """Hold the run folder: rank 0 makes it, and locks its run.lock until the block or the process ends.

    Raises UserError on every rank if another run holds it, or if it cannot be written. Collective.
    """
    descriptor, problem = None, None
    words = f"{socket.gethostname()} process {os.getpid()} {secrets.token_hex(8)}"
    if world.is_main:
        try:
            Path(run).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(Path(run) / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning("%s: this file system has no locks, so a second run in this folder is not refused", run)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, words.encode(), 0)
        except BlockingIOError:
            problem = (
                f"{run}: another run works in this folder. Wait for it, stop it (touch {run}/STOP), or set run=..."
            )
        except OSError as error:
            problem = f"{run}: cannot be written: {error.strerror}. Check its permissions, or set run=..."
    try:
        problem, words = world.share((problem, words))
        if problem:
            raise UserError(problem)
        yield RunLock(Path(run) / LOCK, words)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def book(events: list[dict[str, Any]], now_s: float) -> dict[str, float]:
    """Where the wall time of a run went, in seconds, from its first event to `now_s` (unix).

    productive   steps that count, and their data
    checkpoint   training stood still for a save
    lost         steps that were done and had to be done again, or whose updates were dropped, after a kill or rollback
    restart      from the last sign of life to the next first step: waiting, starting, restoring
    total        the sum; `goodput` is productive / total

    Every second is in one of them. Seconds by which a clock was set back count as none.
    """
    booked = dict.fromkeys(("productive", "checkpoint", "lost", "restart"), 0.0)
    for kind, begin_s, end_s in divide(events, now_s):
        booked[kind] += end_s - begin_s
    total = sum(booked.values())
    return {**booked, "total": total, "goodput": booked["productive"] / total if total else 1.0}


def divide(events: list[dict[str, Any]], now_s: float) -> list[tuple[str, float, float]]:
    """The spans of time that `book` adds up, in order: (kind, begin, end), in unix seconds."""
    spans: list[tuple[str, float, float]] = []
    unsaved: list[tuple[float, float]] = []  # training time that no checkpoint holds yet

    def settle(kind: str) -> None:
        spans.extend((kind, begin_s, end_s) for begin_s, end_s in unsaved)
        unsaved.clear()

    last_s, alive = None, False
    for event in [*events, {"time": now_s, "event": "now", "step": 0}]:
        at_s, name = event["time"], event["event"]
        if last_s is None:
            last_s = at_s
        if name == "start":
            seen_s = max(event.get("last_seen") or last_s, last_s)
            if at_s >= last_s:  # the clock was not set back
                seen_s = min(seen_s, at_s)
            if alive:  # the life before did not say how it ended: what it did after its last save is lost
                unsaved.append((last_s, seen_s))
                settle("lost")
                spans.append(("restart", seen_s, max(at_s, seen_s)))
            else:
                spans.append(("restart", last_s, max(at_s, last_s)))
            alive = True
        else:
            end_s = max(at_s, last_s)
            if not alive:
                spans.append(("restart", last_s, end_s))
            elif name == "save":
                stall_s = min(end_s - last_s, event.get("stall_s", 0.0))
                unsaved.append((last_s, end_s - stall_s))
                settle("productive")
                spans.append(("checkpoint", end_s - stall_s, end_s))
            else:
                unsaved.append((last_s, end_s))
                if name == "rollback":
                    settle("lost")
            if name in ("stop", "done", "hang"):
                settle("productive" if name == "done" or event.get("code") == 85 else "lost")
                alive = False
        last_s = max(last_s, at_s) if name == "now" else at_s
    settle("productive")  # of the life that goes on
    return [span for span in spans if span[2] > span[1]]
