"""The story of a run, and its wall time booked to the second."""

import errno
import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from pretrain.events import Events, book, lock_run, read_events
from pretrain.metrics import Metrics
from pretrain.world import World


def test_events_survive_a_line_cut_short(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.log("start", 0, steps=8)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "event": "sa')
    events.log("save", 3, stall_s=0.5)
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("start", 0), ("save", 3)]
    Events(tmp_path, rank=3).log("hang", 4, rank=0)
    assert (tmp_path / "events.rank-00003.jsonl").exists()
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "save", "hang"]


def test_what_says_nothing_is_passed_over(tmp_path: Path) -> None:
    Events(tmp_path).log("start", 0)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'5\n[]\nnull\n{}\n{"time": "?", "event": "save"}\n{"time": 1e12, "event": "save"}\n\xff\n')
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["start", "save"]
    assert book(events, 1e12)["total"] > 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'5\n{}\n{"step": "x"}\n{"step": 3}\n{"step": 9}\n{"ste')
    Metrics(tmp_path, 3, 8, enabled=True).close()
    assert metrics.read_bytes() == b'{"step": 3}\n'


def test_a_clock_set_back_does_not_turn_the_story_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for now_s, rank, event in [(100, 0, "start"), (110, 3, "hang"), (50, 0, "save"), (60, 0, "done")]:
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        Events(tmp_path, rank).log(event, 0)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "save", "done", "hang"]


def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run(tmp_path, World()) as lock:
        lock.check()
    assert "has no locks" in caplog.text


def story(*events: tuple) -> list[dict]:
    return [{"time": at_s, "event": name, "step": 0, **(facts[0] if facts else {})} for at_s, name, *facts in events]


SAVED = {"stall_s": 2.0}


@pytest.mark.parametrize(
    ("events", "now_s", "expected"),
    [
        # productive, checkpoint, lost, restart
        (story((100, "start"), (110, "save", SAVED), (112, "done")), 112, (10, 2, 0, 0)),
        (story((100, "start")), 130, (30, 0, 0, 0)),  # goes on
        # killed at 125, 15 s after its save; started again at 140
        (story((100, "start"), (110, "save", SAVED), (140, "start", {"last_seen": 125}), (150, "done")), 150, (18, 2, 15, 15)),
        # stopped as asked: nothing lost; the wait until the next life is restart
        (story((100, "start"), (110, "save", SAVED), (110, "stop", {"code": 85}), (130, "start"), (131, "done")), 131, (9, 2, 0, 20)),
        # rolled back: what was done since the save is lost
        (story((100, "start"), (110, "save", SAVED), (120, "rollback"), (126, "done")), 126, (14, 2, 10, 0)),
        # the clock was set back by an hour between two lives, and within one
        (story((9000, "start"), (9010, "save", SAVED), (5410, "start", {"last_seen": 9012}), (5420, "done")), 5420, (18, 2, 2, 0)),
        (story((9000, "start"), (5400, "save", SAVED), (5410, "done")), 5410, (10, 0, 0, 0)),
    ],
)  # fmt: skip
def test_every_second_is_booked(events: list[dict], now_s: float, expected: tuple[float, ...]) -> None:
    booked = book(events, now_s)
    assert tuple(booked[name] for name in ("productive", "checkpoint", "lost", "restart")) == expected
    assert booked["total"] == sum(expected) and booked["goodput"] == pytest.approx(expected[0] / sum(expected))
    assert json.dumps(booked)
