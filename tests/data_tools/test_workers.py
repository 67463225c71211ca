"""Worker processes: results, errors and endings, with real processes."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import pyarrow
import pytest

from data_tools.errors import UserError
from data_tools.workers import choose_processes, run_tasks, start_workers


def ignore(done: int, failure: str = "", size: int = 0) -> None:
    pass


def square(task: int, report) -> tuple[int, int]:
    report(1, "odd" * (task % 2), task)
    return task * task, os.getpid()


def fail(task: int, report) -> None:
    if task == 2:
        raise UserError("t.tsv: a mistake in a worker")
    report(1)


def die(task: int, report) -> None:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def work_for_long(folder: Path, report) -> None:
    """Leave a note of having begun and, unless killed, of having been stopped."""
    (folder / f"begun {os.getpid()}").touch()
    try:
        while True:
            report(1)
            time.sleep(0.01)
    finally:
        (folder / f"stopped {os.getpid()}").touch()


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_is_done_once_and_reported(processes):
    reports = []
    results = dict(run_tasks(square, range(20), processes, lambda *facts: reports.append(facts)))
    assert {number: result[0] for number, result in results.items()} == {number: number**2 for number in range(20)}
    assert len({result[1] for result in results.values()}) <= processes
    assert sorted(reports) == sorted((1, "odd" if task % 2 else "", task) for task in range(20))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_task_is_raised_here(processes):
    with pytest.raises(UserError, match="a mistake in a worker"):
        list(run_tasks(fail, range(8), processes, ignore))


def test_a_worker_that_dies_is_noticed():
    with pytest.raises(UserError, match="ended by signal 9, often for lack of memory"):
        list(run_tasks(die, range(4), 2, ignore))


def test_workers_that_are_no_longer_wanted_clean_up(tmp_path):
    with closing(run_tasks(work_for_long, [tmp_path, tmp_path], 2, interrupt_when_begun(tmp_path))) as results:
        with pytest.raises(KeyboardInterrupt):
            next(results)
    names = sorted(os.listdir(tmp_path))
    assert [name.split()[0] for name in names] == ["begun", "begun", "stopped", "stopped"]


def sleep_if_first(task: tuple[int, Path], report) -> None:
    number, folder = task
    if number:
        work_for_long(folder, report)
    (folder / f"begun {os.getpid()}").touch()
    time.sleep(600)


def test_a_worker_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.workers._STOP_TIMEOUT_S", 0.3)
    tasks = [(0, tmp_path), (1, tmp_path)]
    with closing(run_tasks(sleep_if_first, tasks, 2, interrupt_when_begun(tmp_path))) as results:
        with pytest.raises(KeyboardInterrupt):
            next(results)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.split()[1]), 0)


def test_workers_can_be_started_before_their_tasks_are_known():
    with start_workers(square, 3) as workers:
        results = dict(run_tasks(square, range(2), 3, ignore, workers))
    assert [results[number][0] for number in range(2)] == [0, 1]
    assert len({pid for _, pid in results.values()} - {os.getpid()}) == 2
    with start_workers(square, 1) as workers:
        assert workers is None and list(run_tasks(square, [3], 1, ignore, workers)) == [(0, (9, os.getpid()))]


def test_workers_that_get_nothing_to_do_are_ended(tmp_path):
    with pytest.raises(UserError, match="a change of mind"):
        with start_workers(square, 2):
            raise UserError("a change of mind")
    assert multiprocessing.active_children() == []


def interrupt_when_begun(folder: Path):
    def report(done: int, failure: str = "", size: int = 0) -> None:
        if len(os.listdir(folder)) == 2:
            raise KeyboardInterrupt

    return report


def test_the_number_of_processes():
    assert choose_processes(3) == 3
    assert choose_processes(None) >= 1
    with pytest.raises(UserError, match="--processes 0: give at least 1"):
        choose_processes(0)


def look_for_pandas(task: int, report) -> tuple[bool, bool]:
    return pyarrow.array(["a"]).to_pylist() == ["a"], "pandas" in sys.modules


def test_workers_do_not_import_pandas():
    """pyarrow does so by itself where pandas is installed."""
    pytest.importorskip("pandas")
    found = [result for _, result in run_tasks(look_for_pandas, range(2), 2, ignore)]
    assert found == [(True, False)] * 2
