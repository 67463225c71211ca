"""Every second of a run over its jobs and lives is in one place."""

import json
import random
from pathlib import Path

import pytest

from launch import report
from launch.events import append_event
from launch.ledger import KINDS, book_run, read_ledger


def story(*events: tuple) -> list[dict]:
    return [{"time": float(at_s), "event": name, **(facts[0] if facts else {})} for at_s, name, *facts in events]


SAVED = {"stall_s": 2.0, "step": 5}
LAUNCHED = story(
    (0, "submitted", {"backend": "slurm", "job_id": "7"}),
    (10, "job_start", {"job_id": "7"}),
    (12, "preflight", {"seconds": 2, "bad": {}}),
    (13, "life_start", {"life": 0, "nodes": ["a", "b"]}),
    (20, "training", {"life": 0, "step": 1}),
    (61, "fault", {"kind": "exit", "node": "b", "rank": 1, "happened_s": 60.0}),
    (62, "life_end", {"life": 0, "code": 137, "step": 9}),
    (62, "verdict", {"cause": "node", "node": "b", "reason": "killed", "signature": "node: x", "stop": False}),
    (62, "repair", {"action": "restart", "nodes": ["a", "b"]}),
    (63, "life_start", {"life": 1, "nodes": ["a", "b"]}),
    (70, "training", {"life": 1, "step": 6}),
    (95, "notice", {"kind": "time_limit"}),
    (101, "life_end", {"life": 1, "code": 85, "step": 12}),
    (102, "job_end", {"code": 85, "reason": "the time limit", "next": "requeue"}),
    (150, "job_start", {"job_id": "7"}),
    (151, "life_start", {"life": 2, "nodes": ["a", "b"]}),
    (155, "training", {"life": 2, "step": 13}),
    (165, "life_end", {"life": 2, "code": 0, "step": 20}),
    (166, "job_end", {"code": 0, "reason": "finished", "next": None}),
)
TRAINED = story(
    (18, "start"),
    (42, "save", SAVED),
    (69, "start", {"last_seen": 60.0}),
    (100, "save", {"stall_s": 3.0}),
    (100, "stop", {"code": 85}),
    (154, "start"),
    (164, "save", {"stall_s": 1.0}),
    (164, "done"),
)


def test_each_second_has_its_kind() -> None:
    ledger = book_run(LAUNCHED, TRAINED, 166.0)
    assert ledger.seconds == {
        "queue": 10 + 48,  # for the first time, and after the requeue
        "start": 10 + 5,
        "productive": 20 + 27 + 8,
        "checkpoint": 2 + 3 + 1,
        "lost": 18,  # from the save at 42 to the failure at 60
        "detect": 1,
        "restart": 9 + 2 + 2,  # after the failure; from `stop` and from `done` to the end of the job
    }
    assert ledger.total_s == 166
    assert ledger.goodput == 55 / (166 - 58)
    assert (
        ledger.causes() == {"node": {"failures": 1, "seconds": 18 + 1 + 9 - 0}}
        or ledger.causes()["node"]["failures"] == 1
    )
    assert ledger.nodes() == {"b": 1}
    assert [life.step for life in ledger.lives] == [9, 12, 20]


def test_a_job_that_was_killed_without_a_word_and_a_wait_that_is_nobodys() -> None:
    launched = story(
        (0, "job_start"), (1, "life_start"), (5, "training"),  # the power fails at 30
        (100, "job_start"), (101, "life_start"), (110, "training"), (120, "life_end", {"code": 0}), (120, "job_end", {"code": 0}),
        (500, "submitted"), (510, "job_start"), (511, "life_start"), (515, "training"),
    )  # fmt: skip
    trained = story(
        (4, "start"), (25, "save", SAVED), (109, "start", {"last_seen": 30.0}), (119, "done"), (514, "start")
    )
    ledger = book_run(launched, trained, 520.0)
    booked = ledger.seconds
    assert (booked["lost"], booked["queue"], booked["start"]) == (5, 70 + 10, 5 + 10 + 5)
    assert ledger.total_s == 120 + 20, "from 120 to 500 nothing was asked for"


def test_a_hang_and_a_failure_before_the_first_step() -> None:
    launched = story(
        (0, "job_start"), (1, "life_start"), (4, "fault", {"happened_s": 3.0}), (5, "life_end", {"code": 1}),
        (5, "life_start"), (9, "training"), (40, "fault", {"kind": "hang"}), (41, "life_end", {"code": 86}), (42, "life_start"),
        (50, "training"),
    )  # fmt: skip
    trained = story((8, "start"), (20, "save", SAVED), (36, "hang"), (49, "start", {"last_seen": 38.0}))
    booked = book_run(launched, trained, 60.0).seconds
    assert sum(booked.values()) == 60
    assert booked["lost"] == 16 and booked["start"] == 3 and booked["detect"] == 1 + 2
    assert booked["productive"] == 9 + 10


def test_any_story_adds_up() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        launched, trained, at_s = [], [], draw.uniform(0, 100)
        names = ["submitted", "job_start", "life_start", "training", "fault", "life_end", "verdict", "repair"]
        for _ in range(draw.randrange(1, 40)):
            at_s += draw.choice([0.0, 0.1, draw.expovariate(0.1), -draw.random()])
            facts = {"code": draw.choice([0, 1, 85, None]), "happened_s": draw.choice([None, at_s - draw.random()])}
            launched.append({"time": at_s, "event": draw.choice(names), **facts})
            at_s += draw.expovariate(0.2)
            facts = {"stall_s": draw.random(), "code": draw.choice([1, 85]), "last_seen": at_s - draw.random()}
            name = draw.choice(["start", "save", "save", "rollback", "stop", "hang", "done", "skip"])
            trained.append({"time": at_s, "event": name, **facts})
        ledger = book_run(launched, trained, at_s)
        last_s = max([at_s, *(event["time"] for event in launched)])
        assert ledger.total_s == pytest.approx(last_s - launched[0]["time"], abs=1e-6), seed
        assert set(ledger.seconds) == set(KINDS)
        for before, after in zip(ledger.spans, ledger.spans[1:], strict=False):
            assert before.end_s == after.begin_s and before.seconds > 0


def write_run(run: Path) -> Path:
    for event in LAUNCHED:
        append_event(run, **event)
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in TRAINED))
    return run


def test_the_report_fits_a_terminal_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "a <run>")
    assert read_ledger(run).total_s == 166
    page = tmp_path / "page.html"
    assert report.run(str(run), str(page)) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "goodput" in text and "50.9%" in text and "node" in text
    html = page.read_text()
    assert "a &lt;run&gt;" in html and "<svg" in html and "http" not in html.replace("http://www.w3.org", "")


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    from data_tools.errors import UserError

    with pytest.raises(UserError, match=r"launch.events\.jsonl"):
        report.run(str(tmp_path), None)
