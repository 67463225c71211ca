"""The story of a run, and its wall time booked to the second."""

import json
from pathlib import Path

import pytest

from pretrain.events import Events, book, read_events


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
