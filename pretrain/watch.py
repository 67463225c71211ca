"""The black box: says where each rank is, notices that nothing moves, and finds out which rank is the cause.

A thread of each rank writes RUN/progress/rank-00000.json about once a second. When no step ends for much longer than one
takes, every rank that still runs writes the stacks of its threads and what it was doing into RUN/stacks/; from these the
first cause is named; then the process ends with EXIT_RESTART.
"""

import contextlib
import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from data_tools.files import write_json_atomic
from pretrain.config import ConfigModel, Ratio
from pretrain.events import Events, RunLock, RunTaken
from pretrain.signals import EXIT_INTERRUPTED, EXIT_RESTART
from pretrain.world import World

POLL_S = 0.25
HELD_UP_S = 5.0  # a watch that comes so much too late was itself held up
PROGRESS_S = 1.0
ANSWER_S = 4.0  # for the other ranks to write their stacks
UNWIND_S = 1.0  # for a process that is to end at once to do so by itself, which it cannot within a collective
# A file system is shared by all ranks: with more than these, each writes and looks less often, but for rank 0, whose sign of
# life tells where the run was, and often enough to answer in time.
RANKS_A_SECOND = 100
MOST_PROGRESS_S, MOST_LOOK_S = 10.0, 2.0
LONG = ("save", "restore", "evaluate")  # phases that are no part of a step
PACKAGE = str(Path(__file__).parent) + os.sep
# Code that waits for other ranks. torch's own files call into it from everywhere else.
COUNTED_WAIT = "counted_wait"  # of `Waits`, in which each of them ends, also those that are called from here
COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")


class WatchConfig(ConfigModel):
    """After which time without progress a run ends itself, to be started again."""

    factor: Ratio = 20.0  # times the median step
    least_s: Ratio = 60.0  # but no sooner
    start_s: Ratio = 1800.0  # for the first step, in which things are compiled and caches filled
    save_s: Ratio = 3600.0  # for a checkpoint, also for going back to one, or an evaluation
    straggler_share: Ratio = 0.2  # a rank that is slower than the median by more, three reports running, is named

    @property
    def patience_s(self) -> float:
        """How long collectives wait. A rank that does not arrive is the watch's affair, which tells the cause: it comes first."""
        return 2 * max(self.least_s, self.start_s, self.save_s)


class Facts(NamedTuple):
    """What a rank says of itself when nothing moves."""

    rank: int
    host: str
    step: int
    phase: str
    waits: bool  # for other ranks, in a collective
    place: str  # file:line function, the innermost of this package
    path: list[int]  # line numbers in this package from the training loop inwards: who is ahead


class Watch:
    """`enter(phase, step)` at each change; `start` and `close` bound the thread's life."""

    def __init__(
        self,
        run: str | Path,
        config: WatchConfig,
        world: World,
        lock: RunLock,
        insisted: Callable[[], bool] = lambda: False,  # whether somebody wants this process to end at once
    ) -> None:
        self.insisted, self.insisted_s = insisted, float("inf")
        self.run, self.config, self.rank, self.size = Path(run), config, world.rank, world.size
        self.lock = lock
        self.life = world.share(secrets.token_hex(4))
        self.host, self.main = socket.gethostname(), threading.main_thread().ident
        self.phase, self.step, self.since_s, self.since_time = "start", 0, time.monotonic(), time.time()
        self.step_s: deque[float] = deque(maxlen=101)  # the last steps' times
        self.pace: dict[str, float] = {}  # where a step's time goes on this rank, by the last report
        self.last_step_s: float | None = None
        share = world.size / RANKS_A_SECOND
        self.progress_s = PROGRESS_S if world.is_main else min(MOST_PROGRESS_S, max(PROGRESS_S, share))
        self.look_s = min(MOST_LOOK_S, max(POLL_S, share / 4))
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watch", daemon=True)

    def start(self) -> None:
        for folder in ("progress", "stacks"):
            (self.run / folder).mkdir(parents=True, exist_ok=True)
        self.thread.start()

    def close(self) -> None:
        self.closed.set()
        if self.thread.ident is not None:
            self.thread.join()
            with contextlib.suppress(RunTaken):  # then it is the next life's
                self.lock.check()
                self.write_progress()

    def enter(self, phase: str, step: int) -> None:
        """Say what is done now, `step` steps being done."""
        now_s = time.monotonic()
        if step == self.step + 1 and self.phase in ("data", "step"):
            if self.last_step_s is not None:
                self.step_s.append(now_s - self.last_step_s)
            self.last_step_s = now_s
        elif step != self.step or self.phase in LONG:
            self.last_step_s = now_s
        self.phase, self.step, self.since_s, self.since_time = phase, step, now_s, time.time()

    def limit_s(self) -> float:
        """How long nothing may move."""
        if self.phase in LONG:
            return self.config.save_s
        if self.phase == "start" or len(self.step_s) < 3:
            return self.config.start_s
        return max(self.config.least_s, self.config.factor * statistics.median(self.step_s))

    def watch(self) -> None:
        written_s = looked_s = float("-inf")
        polled_s = time.monotonic()
        while not self.closed.wait(POLL_S):
            now_s = time.monotonic()
            if now_s - polled_s > HELD_UP_S:  # as all threads are in a suspended job: for that time nobody is to blame
                self.since_s += now_s - polled_s
            polled_s = now_s
            if self.insisted():
                self.insisted_s = min(self.insisted_s, now_s)
            if now_s - self.insisted_s > UNWIND_S:
                print(f"rank {self.rank}: interrupted", file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
            if now_s - written_s >= self.progress_s:
                written_s = now_s
                self.leave_if_taken()
                self.write_progress()
            if now_s - self.since_s > self.limit_s():
                self.end()
            if now_s - looked_s >= self.look_s:
                looked_s = now_s
                if self.reports().exists():
                    self.end()

    def leave_if_taken(self) -> None:
        """End the process where another life has the folder: this one was frozen or cut off, and its ranks are gone."""
        try:
            self.lock.check()
        except RunTaken as error:
            print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
            os._exit(EXIT_RESTART)

    def write_progress(self) -> None:
        path = self.run / "progress" / f"rank-{self.rank:05d}.json"
        facts = {"time": time.time(), "rank": self.rank, "host": self.host, "pid": os.getpid(), "step": self.step}
        facts |= {"phase": self.phase, "since": self.since_time, **self.pace}
        try:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, path)
        except OSError as error:  # a sign of life that cannot be given is no reason to die
            print(f"rank {self.rank}: {path}: {error.strerror}", file=sys.stderr, flush=True)

    def reports(self) -> Path:
        """Where the ranks of this life report; it exists once one of them has found that nothing moves."""
        return self.run / "stacks" / self.life

    def end(self) -> None:
        """Write stacks and facts, wait for those of the others, let one rank name the cause, and end the process."""
        try:
            self.report()
            answers = self.collect()
            if answers[0].name == self.report_name():  # one of them tells, and only that one reads what all say
                self.tell([Facts(**json.loads(path.read_text())) for path in answers])
        except Exception:
            traceback.print_exc()  # such as a full disk: it has to end all the same
        finally:
            os._exit(EXIT_RESTART)

    def report(self) -> None:
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = []
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] != self.main):
            if ident != threading.get_ident():
                parts.append(f"{names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
        stacks = self.run / "stacks" / f"rank-{self.rank:05d}-{self.host}.txt"
        stacks.write_text("\n".join(parts))
        self.reports().mkdir(exist_ok=True)
        facts = Facts(self.rank, self.host, self.step, self.phase, *describe(frames[self.main]))
        write_json_atomic(self.reports() / self.report_name(), facts._asdict())

    def report_name(self) -> str:
        return f"rank-{self.rank:05d}.json"

    def collect(self) -> list[Path]:
        """What the ranks have reported, by rank, when all have or enough was waited for."""
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            found = sorted(self.reports().glob("rank-*.json"))
            if len(found) == self.size or time.monotonic() > deadline_s:
                return found
            time.sleep(min(self.look_s, 0.5) / 5)

    def tell(self, facts: list[Facts]) -> None:
        rank, why = first_cause(facts, self.size)
        host = next((fact.host for fact in facts if fact.rank == rank), None) or self.last_host(rank)
        stacks = [f"rank-{fact.rank:05d}-{fact.host}.txt" for fact in facts]
        since = f"nothing has moved for {time.monotonic() - self.since_s:.0f} s"
        print(
            f"{since}. First cause: rank {rank} on {host} {why}. Stacks: {self.run / 'stacks'}",
            file=sys.stderr,
            flush=True,
        )
        Events(self.run, self.rank).log("hang", self.step, rank=rank, host=host, reason=why, stacks=stacks)

    def last_host(self, rank: int) -> str:
        """The node of a rank that no longer answers, as its last sign of life has it."""
        try:
            return json.loads((self.run / "progress" / f"rank-{rank:05d}.json").read_text())["host"]
        except (OSError, ValueError, KeyError):
            return "an unknown node"


def describe(frame: FrameType) -> tuple[bool, str, list[int]]:
    """Of a thread's stack: whether it waits in a collective, its innermost place in this package, and the lines there."""
    stack = traceback.extract_stack(frame)
    waits = any(part in entry.filename for entry in stack for part in COLLECTIVES) or stack[-1].name == COUNTED_WAIT
    ours = [entry for entry in stack if entry.filename.startswith(PACKAGE) and entry.name != COUNTED_WAIT]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "outside the package"
    names = [entry.name for entry in ours]
    loop = names.index("train") if "train" in names else 0
    return waits, place, [entry.lineno for entry in ours[loop:]]


def first_cause(facts: list[Facts], size: int) -> tuple[int, str]:
    """The rank because of which the others wait, and why it is that one.

    One that does not answer; else one that does not wait for others; else, where all wait, the one that waits elsewhere than
    most, and of two the one that is ahead: it has left out a collective in which the other still stands.
    """
    answering = {fact.rank for fact in facts}
    silent = [rank for rank in range(size) if rank not in answering]
    if silent:
        return silent[0], "does not answer: it is frozen, or its node is"
    busy = [fact for fact in facts if not fact.waits]
    if busy:
        late = min(busy, key=lambda fact: (fact.step, fact.path))
        doing = "waits for its data" if late.phase == "data" else "did not arrive at the others' collective"
        return late.rank, f"{doing} (step {late.step}, {late.place})"
    counts = Counter((fact.step, tuple(fact.path)) for fact in facts)
    most = max(counts.values())
    usual = min(place for place, count in counts.items() if count == most)
    odd = [fact for fact in facts if (fact.step, tuple(fact.path)) != usual] or facts
    ahead = max(odd, key=lambda fact: (fact.step, fact.path))
    return ahead.rank, f"stands in another collective than the others (step {ahead.step}, {ahead.place})"
