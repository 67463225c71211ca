"""What the supervisors of a job tell each other by the run folder, the one thing that all nodes share.

    RUN/launch/lives/00003                     which job and node has begun this life: made once, so only one can begin it
    RUN/launch/jobs/JOB/node-NAME.json         where the supervisor of a node listens
    RUN/launch/jobs/JOB/sign-NAME              a count that goes up while the node can reach the folder
    RUN/launch/jobs/JOB/generation-00002       which node leads since then: made once, so only one can
    RUN/launch/jobs/JOB/notice                 a word, from the batch script or by hand: time_limit, preemption, cancel
    RUN/launch/jobs/JOB/end                    the exit code of the job, when it has ended

A folder on a network may stand still for minutes, so all this happens in a thread: nobody else waits for it.
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.files import TEMPORARY_SUFFIX
from launch.events import FOLDER

LOOK_S = 0.5
NODES_A_SECOND, MOST_LOOK_S = 128, 5.0  # with more nodes than that, each looks less often
SIGN_S = 1.0
RANKS_S = 5.0  # a rank has much longer to give a sign of life
RETRY_S, RETRIES = 1.0, 60  # of what the folder did not let us do
NOTICES = ("time_limit", "preemption", "cancel", "stop_file")


@dataclass
class Look:
    """What was found in the folder last."""

    generation: int = 0
    notice: str | None = None
    stop_file: bool = False
    end: int | None = None
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    signs: dict[str, tuple[str, float]] = field(default_factory=dict)  # the count, and when it was last seen to change
    progress: dict[int, dict[str, Any]] = field(default_factory=dict)  # signs of life of ranks
    at_s: float = 0.0


class Shared:
    """The thread and what it found. `do` has it call a function, in order; `look_for` says what to look at."""

    def __init__(self, run: Path, job: str, node: str, nodes: int) -> None:
        self.run, self.job, self.node = run, job, node
        self.launch = run / FOLDER
        self.folder = self.launch / "jobs" / job
        self.lives = self.launch / "lives"
        self.look = Look()
        self.look_s = max(LOOK_S, min(MOST_LOOK_S, nodes / NODES_A_SECOND))
        self.ranks: list[int] = []  # whose signs of life to read now and then: those of this node
        self.leading = False  # then rank 0's is read at each look
        self.ranks_read_s = 0.0
        self.doubted: list[str] = []  # nodes whose signs to read
        self.regular: Callable[[], None] | None = None  # done at each look
        self.tasks: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self.count, self.signed_s = 0, float("-inf")
        for folder in (self.folder, self.lives):
            folder.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self.work, name="shared", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self, timeout_s: float) -> None:
        """Do what is still to be done, but wait no longer than that."""
        self.tasks.put(None)
        self.thread.join(timeout_s)

    def do(self, function: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        self.tasks.put((future, function, arguments))
        return future

    def work(self) -> None:
        due_s = 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                task = self.tasks.get(timeout=max(0.0, due_s - time.monotonic()))
                if task is None:
                    return
                future, function, arguments = task
                self.call(future, function, arguments)
                continue
            due_s = time.monotonic() + self.look_s
            with contextlib.suppress(OSError):  # a folder that cannot be reached now is looked at again
                self.look_around()

    def call(self, future: Future, function: Callable, arguments: tuple) -> None:
        """Call it, again and again while the folder is in trouble."""
        for attempt in range(RETRIES + 1):
            try:
                future.set_result(function(*arguments))
                return
            except OSError as error:
                if attempt == RETRIES:
                    future.set_exception(error)
                    return
                print(f"{error.filename or self.launch}: {error.strerror}; trying again", flush=True)
                time.sleep(RETRY_S)
            except Exception as error:
                future.set_exception(error)
                return

    def look_around(self) -> None:
        now_s = time.monotonic()
        if now_s - self.signed_s >= SIGN_S:
            self.signed_s = now_s
            self.count += 1
            replace(self.folder / f"sign-{self.node}", str(self.count))
        known = self.look
        look = Look(places=dict(known.places), signs=dict(known.signs), progress=dict(known.progress))
        for name in os.listdir(self.folder):
            kind, _, what = name.partition("-")
            if name.endswith(TEMPORARY_SUFFIX):
                continue
            if kind == "generation":
                look.generation = max(look.generation, int(what))
            elif kind == "node":
                node = what.removesuffix(".json")
                if node not in look.places:
                    look.places[node] = json.loads((self.folder / name).read_text())
            elif name == "notice":
                word = (self.folder / name).read_text().strip()
                look.notice = word if word in NOTICES else "cancel"
            elif name == "end":
                look.end = int((self.folder / name).read_text())
        for node in list(self.doubted):
            with contextlib.suppress(OSError):
                sign = (self.folder / f"sign-{node}").read_text()
                if look.signs.get(node, ("", 0.0))[0] != sign:
                    look.signs[node] = (sign, now_s if node in look.signs else float("-inf"))
        look.stop_file = (self.run / "STOP").exists()
        ranks = [0] if self.leading else []
        if now_s - self.ranks_read_s >= RANKS_S:
            self.ranks_read_s = now_s
            ranks += self.ranks
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError):
                path = self.run / "progress" / f"rank-{rank:05d}.json"
                look.progress[rank] = json.loads(path.read_text())
        look.at_s = now_s
        self.look = look
        if self.regular:
            self.regular()

    # What `do` is given.

    def publish(self, place: dict[str, Any]) -> None:
        replace(self.folder / f"node-{self.node}.json", json.dumps(place))

    def claim_generation(self, generation: int) -> bool:
        """Whether this node leads from now on, and no other."""
        return claim(self.folder / f"generation-{generation:05d}", self.node)

    def claim_life(self, life: int | None, generation: int) -> int | None:
        """The number of the new life, which is then this leader's to begin; None where another one leads.

        None for `life`: the one after the last that was ever begun. The lock of the run goes: should a process of an older
        life still be there, such as one on a frozen node, it finds that its lock has gone before it writes anything.
        """
        generations = [int(name[11:]) for name in os.listdir(self.folder) if name.startswith("generation-")]
        if max(generations, default=0) > generation:
            return None
        if life is None:
            found = max((int(name) for name in os.listdir(self.lives) if name.isdigit()), default=0)
            while not claim(self.lives / f"{found + 1:05d}", f"{self.job} {self.node}"):
                found += 1
            life = found + 1
        elif not claim(self.lives / f"{life:05d}", f"{self.job} {self.node}"):
            return None
        (self.run / "run.lock").unlink(missing_ok=True)
        return life

    def write_end(self, code: int) -> None:
        replace(self.folder / "end", f"{code}\n")


def claim(path: Path, who: str) -> bool:
    """Make the file, if nobody has."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "w") as file:
        file.write(who + "\n")
    return True


def replace(path: Path, text: str) -> None:
    """Write a small file that readers see whole; it need not survive a power cut."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.write_text(text)
    os.replace(temporary, path)
