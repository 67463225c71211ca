"""A run in which nothing moves: stacks of the ranks that live, the right first cause, and the exit code for a restart."""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lives import LifeOfRun, arguments, events_of
from ranks import run_on_ranks

from pretrain.events import LOCK, RunLock
from pretrain.signals import StopRequest
from pretrain.watch import Facts, Watch, WatchConfig, first_cause
from pretrain.world import World, connect

HANG_AFTER = 5  # steps done; some times must be known
LOOP = re.compile(r'pretrain/train\.py", line \d+, in run$', re.MULTILINE)  # in a stack
LIMIT_S = 2.5  # long enough for a step on a machine that has other work


def is_guilty(run: Path) -> bool:
    """Whether this is the rank that breaks: that of the number at the end of the run's name."""
    return os.environ["RANK"] == run.name.rpartition("-")[2]


def instead_of_judging(run: Path, act: Callable[[], None]) -> None:
    """Let the guilty rank `act` within its step, once enough steps are done."""
    from pretrain.life import Life

    plain = Life.judge

    def judge(life, *others):
        if life.watch.step >= HANG_AFTER and is_guilty(run):
            act()
        return plain(life, *others)

    Life.judge = judge


def freeze(run: Path) -> None:
    """The whole process stands still, watch included, as on a node that has hung."""
    instead_of_judging(run, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def skip_a_collective(run: Path) -> None:
    """Leaves out a barrier, in a group of its own: in the group of the other collectives, gloo finds messages of
    another size than it waits for, and ends the process before anybody hangs."""
    from pretrain.life import Life

    plain, group = Life.wait_for, None

    def wait_for(life, *others, **named):
        nonlocal group
        group = group or dist.new_group(backend="gloo")
        if life.watch.step >= HANG_AFTER and not is_guilty(run):
            dist.barrier(group=group)
        return plain(life, *others, **named)

    Life.wait_for = wait_for


def stick_in_data(run: Path) -> None:
    """A decoding thread that never comes back."""
    from pretrain.data.loader import Loader

    plain = Loader.fill

    def fill(loader, filling, first, last):
        if is_guilty(run) and filling.draw.positions[0] >= HANG_AFTER * loader.global_batch:
            threading.Event().wait()
        plain(loader, filling, first, last)

    Loader.fill = fill


def stick_in_a_step(run: Path) -> None:
    """Busy with something else."""
    instead_of_judging(run, lambda: time.sleep(1000))


CAUSES = {
    freeze: "does not answer",
    skip_a_collective: "another collective",
    stick_in_data: "waits for its data",
    stick_in_a_step: "did not arrive",
}


def assert_cause_is_named(hook, shards: Path, run: Path) -> None:
    overrides = ["watch.factor=1.0", f"watch.least_s={LIMIT_S}", "checkpoint.every_steps=100"]
    life = LifeOfRun(run, arguments(shards, run, "train.duration=9 steps", *overrides), 2, hook)
    codes = life.wait(grace_s=8)
    guilty = int(run.name.rpartition("-")[2])
    expected = [86, 86]
    if hook is freeze:
        expected[guilty] = -signal.SIGKILL
    assert codes == expected, life.stderr()
    (event,) = events_of(run, "hang")
    assert event["rank"] == guilty and CAUSES[hook] in event["reason"], event
    stacks = [(run / "stacks" / name).read_text() for name in event["stacks"]]
    assert len(stacks) == (1 if hook is freeze else 2) and all(LOOP.search(text) for text in stacks)
    last_step_time = max(path.stat().st_mtime for path in [run / "metrics.jsonl"])
    assert event["time"] - last_step_time < LIMIT_S + 10


@pytest.mark.parametrize("hook", list(CAUSES), ids=lambda hook: hook.__name__)
def test_the_first_cause_is_named(hook, shards: Path, tmp_path: Path) -> None:
    assert_cause_is_named(hook, shards, tmp_path / "run-1")


@pytest.mark.faults
def test_the_first_cause_is_named_twenty_times(shards: Path, tmp_path: Path) -> None:
    for number in range(20):
        assert_cause_is_named(
            list(CAUSES)[number % len(CAUSES)], shards, tmp_path / str(number) / f"run-{number // len(CAUSES) % 2}"
        )


def fact(rank: int, step: int = 7, phase: str = "step", waits: bool = True, path: list[int] | None = None) -> Facts:
    return Facts(rank, f"node-{rank}", step, phase, waits, f"file.py:{path} f", path or [100, 10])


@pytest.mark.parametrize(
    ("facts", "rank"),
    [
        ([fact(0), fact(1), fact(3)], 2),  # silent
        ([fact(0), fact(1, phase="data", waits=False), fact(2)], 1),
        ([fact(0, waits=False), fact(1, step=6, waits=False), fact(2)], 1),  # the one that is further behind
        ([fact(0), fact(1), fact(2, path=[90, 10])], 2),  # elsewhere than most
        ([fact(0), fact(1, path=[120])], 1),  # of two, the one that went on
        ([fact(0, step=8, path=[90]), fact(1, path=[120])], 0),
    ],
)
def test_the_first_cause_of_what_ranks_say(facts: list[Facts], rank: int) -> None:
    assert first_cause(facts, 4 if len(facts) == 3 and facts[-1].rank == 3 else len(facts))[0] == rank


def test_limits_follow_the_median_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    watch = Watch(
        tmp_path, WatchConfig(factor=20, least_s=5, start_s=900, save_s=700), World(), RunLock(tmp_path / LOCK, "")
    )
    assert watch.limit_s() == 900
    for step in range(8):
        watch.enter("data", step)
        watch.enter("step", step)
        now_s += 2.0 if step != 5 else 50.0
    assert watch.limit_s() == 40
    watch.enter("save", 8)
    assert watch.limit_s() == 700
    now_s += 500
    watch.enter("data", 8)
    watch.enter("data", 9)
    assert watch.limit_s() == 40 and max(watch.step_s) == 50 and len(watch.step_s) == 8
    watch.enter("step", 9)
    watch.enter("restore", 9)  # going back to a checkpoint
    assert watch.limit_s() == 700
    now_s += 500
    watch.enter("data", 6)
    watch.enter("data", 7)
    assert watch.limit_s() == 40 and max(watch.step_s) == 50


@pytest.mark.parametrize(("gap_s", "ends"), [(3000.0, 0), (4.0, 1)])
def test_time_in_which_the_process_was_stopped_does_not_count(
    gap_s: float, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a suspended job; a watch that is only late counts."""
    now_s, gaps, ended = 100.0, [gap_s, 0.25, 0.25], []

    class Closed:
        def wait(self, timeout_s: float) -> bool:
            nonlocal now_s
            now_s += gaps.pop(0) if gaps else 0
            return not gaps

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    watch = Watch(tmp_path, WatchConfig(start_s=4), World(), RunLock(tmp_path / LOCK, ""))
    watch.closed = Closed()
    monkeypatch.setattr(watch, "end", lambda: ended.append(now_s))
    monkeypatch.setattr(watch, "leave_if_taken", lambda: None)
    monkeypatch.setattr(watch, "write_progress", lambda: None)
    watch.watch()
    assert len(ended) == ends


def test_collectives_wait_longer_than_the_watch() -> None:
    """Else they would fail before it could name the cause, in a start or a save that takes a while."""
    config = WatchConfig()
    assert config.patience_s > max(config.start_s, config.save_s, config.least_s)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told = run_on_ranks(join_and_tell, 2, config.patience_s, port)
    assert told == [config.patience_s] * 2


def join_and_tell(world: World, patience_s: float, port: int) -> float:
    """In each rank: the time after which a collective of a job that was joined with this patience would fail."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    connect(patience_s)
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_a_life_that_has_been_given_up_gives_no_sign_at_its_end(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("mine")
    watch = Watch(tmp_path, WatchConfig(), World(), RunLock(tmp_path / LOCK, "mine"))
    watch.closed.set()  # its thread looks no more
    watch.start()
    (tmp_path / LOCK).write_text("another's")
    watch.close()
    assert not list((tmp_path / "progress").iterdir())


def wait_for_nobody(run: Path) -> None:
    """A process whose main thread hangs in C, as in a collective to which another rank does not come."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stop = StopRequest()
    watch = Watch(run, WatchConfig(), World(), RunLock(run / LOCK, ""), stop.insisted)
    watch.start()
    (run / "hangs").touch()
    mutex = ctypes.create_string_buffer(64)  # zeros: one that nobody holds
    for _ in range(2):  # the second waits for ever, whatever signals come
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_a_second_ctrl_c_ends_a_rank_that_hangs(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=wait_for_nobody, args=(tmp_path,))
    process.start()
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for _ in range(2):
        time.sleep(0.5)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
    process.join(15)
    code = process.exitcode
    process.kill()
    assert code == 130


def test_one_rank_reads_what_all_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand, each would else read a thousand files."""
    monkeypatch.setattr(World, "share", lambda world, value: "life")
    monkeypatch.setattr(os, "_exit", lambda code: None)
    told = []
    for rank in (1, 0):
        watch = Watch(tmp_path, WatchConfig(), World(rank, 2), RunLock(tmp_path / LOCK, ""))
        watch.reports().mkdir(parents=True, exist_ok=True)
        (watch.reports() / f"rank-{1 - rank:05d}.json").write_text(json.dumps(fact(1 - rank)._asdict()))
        monkeypatch.setattr(watch, "tell", lambda facts, rank=rank: told.append((rank, [said.rank for said in facts])))
        watch.end()
    assert told == [(0, [0, 1])]


@pytest.mark.parametrize(
    ("rank", "size", "progress_s", "look_s"),
    [(0, 4096, 1.0, 2.0), (1, 100, 1.0, 0.25), (1, 400, 4.0, 1.0), (9, 4096, 10.0, 2.0)],
)
def test_many_ranks_ask_less_of_the_file_system(
    rank: int, size: int, progress_s: float, look_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "share", lambda world, value: value)
    watch = Watch(tmp_path, WatchConfig(), World(rank, size), RunLock(tmp_path / LOCK, ""))
    assert (watch.progress_s, watch.look_s) == (progress_s, look_s)
