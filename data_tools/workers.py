"""Runs independent tasks in worker processes that never outlive their parent and end cleanly on Ctrl-C.

Each worker talks to the parent over a pipe of its own. A parent that dies, even by SIGKILL, closes the pipes and the
workers end; a worker that dies closes its end and the parent says so, instead of waiting for a result that never comes.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from data_tools.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[..., None]
"""report(done, failure="", size=0): tells about items done since the last call, why they failed if they did, and the
bytes written. What comes from workers may arrive added up. Raises WorkStopped when the parent has gone."""

_STOP_TIMEOUT_S = 10.0
_TELL_EVERY_S = 0.1
_REASONS_SHOWN = 2


class WorkStopped(BaseException):
    """Raised inside a task whose parent no longer wants it; not an Exception, so that no task swallows it."""


def run_tasks(
    function: Callable[[Task, Report], Result],
    tasks: Sequence[Task],
    processes: int,
    report: Report,
    workers: "Workers | None" = None,
) -> Iterator[tuple[int, Result]]:
    """Call `function(task, report)` for each task; yield (task number, result) as they finish, in any order.

    `function` is importable, tasks and results can be pickled. One process runs the tasks right here. An error in a
    task stops all and is raised here. Close the iterator when leaving it early. `workers` are those that
    `start_workers` has started for this function. Raises UserError when a worker dies, as it does when memory runs out.
    """
    if min(processes, len(tasks)) <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task, report)
        return
    workers = workers or Workers(function, min(processes, len(tasks)))
    try:
        yield from workers.distribute(tasks, report)
    finally:
        workers.stop()


@contextlib.contextmanager
def start_workers(function: Callable, processes: int) -> Iterator["Workers | None"]:
    """Start workers for `run_tasks` while it is still being found out what they are to do; None for one process."""
    workers = Workers(function, processes) if processes > 1 else None
    try:
        yield workers
    finally:
        if workers is not None:
            workers.give_up()


class Workers:
    """Processes that call one function, forked by a process that has imported its modules once for all of them.

    That one, the nursery, does nothing else and has no threads of ours, so forking it is safe. What it tells of each
    worker is (place, pid, None) at its start and (place, pid, exit code) at its end.
    """

    def __init__(self, function: Callable, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = zip(*(context.Pipe() for _ in range(count)), strict=True)
        self._connections, self._pids = ours, {}
        self._fates, told = context.Pipe(duplex=False)
        self._nursery = context.Process(target=_nurse, args=(function, theirs, told))
        with _ignore_interrupts():  # Ctrl-C reaches the whole process group, and only the parent is to answer it
            self._nursery.start()
        for connection in (*theirs, told):
            connection.close()

    def distribute(self, tasks: Sequence[Task], report: Report) -> Iterator[tuple[int, Any]]:
        """Hand out the tasks, and yield (task number, result) as they finish."""
        waiting = iter(range(len(tasks)))
        unfinished = 0

        def hand_out(connection: multiprocessing.connection.Connection) -> int:
            number = next(waiting, None)
            if number is None:
                return 0
            with contextlib.suppress(BrokenPipeError):  # a worker that died is noticed when its end of the pipe is read
                connection.send((number, tasks[number]))
            return 1

        at_work = self._connections[: len(tasks)]
        for connection in at_work:
            unfinished += hand_out(connection)
        while unfinished:
            for connection in multiprocessing.connection.wait(at_work):
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._describe_death(at_work.index(connection)) from None
                if kind == "progress":
                    for facts in content:
                        report(*facts)
                elif kind == "error":
                    error, trace = content
                    raise error from RuntimeError(f"in a worker process:\n{trace}")
                else:
                    unfinished += hand_out(connection) - 1
                    yield content

    def stop(self) -> None:
        """Close the pipes, so that workers end at their next report and remove what they had begun; then insist."""
        for connection in self._connections:
            connection.close()
        self._nursery.join(_STOP_TIMEOUT_S)
        if self._nursery.is_alive():
            while self._read_fate(0.0) is not None:
                pass
            for pid in self._pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._nursery.join()

    def give_up(self) -> None:
        """End workers that were never given anything to do; those that have been stopped are left alone."""
        for connection in self._connections:
            connection.close()
        self._nursery.kill()
        self._nursery.join()

    def _read_fate(self, patience_s: float) -> tuple[int, int, int | None] | None:
        """The next of the things that the nursery tells, if it comes in time."""
        with contextlib.suppress(EOFError):
            if self._fates.poll(patience_s):
                place, pid, code = self._fates.recv()
                self._pids[place] = pid
                if code is not None:
                    del self._pids[place]
                return place, pid, code
        return None

    def _describe_death(self, place: int) -> UserError:
        fate = self._read_fate(_STOP_TIMEOUT_S)
        while fate is not None and (fate[0] != place or fate[2] is None):
            fate = self._read_fate(_STOP_TIMEOUT_S)
        if fate is None:  # they have not even started
            self._nursery.join(_STOP_TIMEOUT_S)
            fate = (place, self._nursery.pid, self._nursery.exitcode)
        _, pid, code = fate
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return UserError(
            f"worker process {pid}: ended by {cause}, often for lack of memory. "
            "Run the same command again, with fewer --processes if it happens again"
        )


@contextlib.contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Let processes that are started in the block be deaf to Ctrl-C from their first moment."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


def _nurse(
    function: Callable,
    connections: Sequence[multiprocessing.connection.Connection],
    told: multiprocessing.connection.Connection,
) -> None:
    """The body of the nursery: fork a worker for each connection, and tell what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # no worker's garbage collector is to look through what was imported, and so to copy it
    context = multiprocessing.get_context("fork")
    workers = {}
    for place, connection in enumerate(connections):
        others = [other for other in (*connections, told) if other is not connection]
        process = context.Process(target=_work, args=(function, connection, others))
        with warnings.catch_warnings():  # Python warns of threads from 3.12 on; those of numpy's OpenBLAS expect a fork
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        workers[process.sentinel] = place, process
    with contextlib.suppress(BrokenPipeError):  # the parent has gone, and so will they
        for connection in connections:
            connection.close()
        for place, process in workers.values():
            told.send((place, process.pid, None))
        while workers:
            for sentinel in multiprocessing.connection.wait(list(workers)):
                place, process = workers.pop(sentinel)
                process.join()
                told.send((place, process.pid, process.exitcode))


def _work(
    function: Callable,
    connection: multiprocessing.connection.Connection,
    others: Sequence[multiprocessing.connection.Connection],
) -> None:
    """The body of a worker: receive a task, send its result, until the parent closes the pipe."""
    for other in others:  # while anyone has one open, its end would not be noticed
        other.close()
    if "pyarrow" in sys.modules:  # the module of `function` has imported it
        keep_pandas_out()

    # Each message wakes the parent, on the processors that the workers need: so what adds up is told now and then.
    waiting: dict[str, tuple[int, int]] = {}
    told_s = 0.0

    def tell() -> None:
        nonlocal told_s
        told_s = time.monotonic()
        facts = [(done, failure, size) for failure, (done, size) in waiting.items()]
        waiting.clear()
        try:
            connection.send(("progress", facts))
        except OSError:
            raise WorkStopped from None

    def report(done: int, failure: str = "", size: int = 0) -> None:
        done_before, size_before = waiting.get(failure, (0, 0))
        waiting[failure] = (done_before + done, size_before + size)
        if time.monotonic() - told_s >= _TELL_EVERY_S:
            tell()

    with contextlib.suppress(EOFError, OSError, WorkStopped):
        while True:
            number, task = connection.recv()
            try:
                message = ("result", (number, function(task, report)))
                if waiting:
                    tell()
            except Exception as error:
                message = ("error", (_make_sendable(error), traceback.format_exc()))
            connection.send(message)


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ImportError(name)


def keep_pandas_out() -> None:
    """Let pyarrow find no pandas in this process, which is ours alone.

    It imports pandas, where that is installed, at the first array that it makes, to see whether the values are its. We
    never have such, and the import costs a quarter of a second and 40 MB in each process. pyarrow looks but once.
    """
    import pyarrow

    sys.meta_path.insert(0, _NoPandas)
    try:
        pyarrow.array([])
    finally:
        sys.meta_path.remove(_NoPandas)


def _make_sendable(error: Exception) -> Exception:
    """The error itself, or its text when it does not survive pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def open_progress_bar(total: int, unit: str) -> Iterator[Report]:
    """Show items and bytes a second, time left and failures by reason on stderr, when that is a terminal.

    Yields the function to report items to.
    """
    from tqdm import tqdm

    failures: Counter[str] = Counter()
    written, started_s = 0, time.monotonic()
    with tqdm(total=total, unit=unit, disable=None, smoothing=0.05, dynamic_ncols=True) as bar:
        if bar.disable:
            yield lambda done, failure="", size=0: None
            return

        def report(done: int, failure: str = "", size: int = 0) -> None:
            nonlocal written
            written += size
            if failure:
                failures[failure] += done
            facts = [f"{written / 1e6 / max(time.monotonic() - started_s, 1e-9):.1f} MB/s"] if written else []
            facts += [f"{reason} {number}" for reason, number in failures.most_common(_REASONS_SHOWN)]
            bar.set_postfix_str(", ".join(facts), refresh=False)
            bar.update(done)

        yield report


def choose_processes(asked: int | None) -> int:
    """The number asked for, or the processors that this process may use (on a shared node, fewer than there are).

    Raises UserError for a number below one.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--processes {asked}: give at least 1")
    return asked or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
