"""The judgement on failures, most of which were really made (tests/launch/failures), and on what the lives before say."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.judge import (
    Evidence,
    RankEnd,
    Verdict,
    judge,
    load_bad_nodes,
    normalise,
    recall_verdicts,
    remember_bad_node,
    verdict_facts,
)

FAILURES, HELD_OUT = (Path(__file__).with_name(name) for name in ("failures", "held_out"))


def load_lives(path: Path) -> tuple[dict, list[Evidence]]:
    case = json.loads(path.read_text())
    lives = [Evidence(**{**life, "ranks": tuple(RankEnd(**end) for end in life["ranks"])}) for life in case["lives"]]
    return case["expect"], lives


def judge_lives(lives: list[Evidence], **options) -> list[Verdict]:
    history: list[Verdict] = []
    for life in lives:
        history.append(judge(life, history, **options))
    return history


@pytest.mark.parametrize("path", sorted(FAILURES.glob("*.json")), ids=lambda path: path.stem)
def test_a_failure_is_judged_right(path: Path) -> None:
    expected, lives = load_lives(path)
    verdicts = judge_lives(lives)
    last = verdicts[-1]
    assert (last.cause, last.stop, last.exclude) == (expected["cause"], expected["stop"], expected["exclude"]), last
    assert expected["node"] in (None, last.node), last
    assert not any(verdict.stop for verdict in verdicts[:-1])
    assert "\n" not in last.reason and last.reason
    if expected["excerpt"]:
        assert expected["excerpt"] in last.excerpt and expected["excerpt"] in last.reason


@pytest.mark.parametrize("path", sorted(HELD_OUT.glob("*.txt")), ids=lambda path: path.stem)
def test_a_log_is_read_right(path: Path) -> None:
    """Logs that were written after the rules, to see whether those carry over; docs/launch.md tells how many did."""
    head, _, log = path.read_text().partition("\n\n")
    facts = dict(line.split(": ", 1) for line in head.splitlines())
    how, _, number = facts["end"].partition(" ")
    values = {"code": int(number), "signal": None} if how == "exit" else {"code": None, "signal": int(number)}
    verdict = judge(life(end(0, **RUNS_ON), end(1, **values, log=log)), [])
    assert (verdict.cause, verdict.node) == (facts["cause"], "node2"), verdict


def end(
    rank: int = 0, code: int | None = 1, signal: int | None = None, at: float | None = 1.0, log: str = "", node=None
):
    return RankEnd(rank, node or f"node{rank + 1}", 0, code, signal, at, log)


def life(*ends: RankEnd, number: int = 0, step: int | None = 7, **facts) -> Evidence:
    return Evidence(number, 0.0, 10.0, step, ends, facts.pop("lost_nodes", {}), **facts)


CRASH = 'Traceback (most recent call last):\n  File "/code/train.py", line {}, in step\n    x = y\nValueError: bad {}\n'
RUNS_ON = dict(code=None, at=None)


def test_a_crash_at_the_same_step_costs_two_lives_on_one_node_too() -> None:
    first, second = judge_lives([life(end(log=CRASH.format(3, 0x1))), life(end(log=CRASH.format(3, 0x2)), number=1)])
    assert (first.cause, first.stop, second.cause, second.stop) == ("code", False, "code", True)
    assert second.excerpt.startswith("Traceback")


def test_a_crash_at_another_step_is_tried_again() -> None:
    assert not judge_lives([life(end(log=CRASH.format(3, 1))), life(end(log=CRASH.format(3, 1)), step=8)])[1].stop


def test_a_crash_of_c_code_needs_not_be_seen_at_the_very_same_step() -> None:
    lives = [life(end(0, None, signal=11), end(1, **RUNS_ON), step=step) for step in (120, 126)]
    assert judge_lives(lives)[1].stop
    assert not judge_lives([lives[0], replace(lives[1], step=180)])[1].stop


def test_where_a_project_lies_is_no_sign_of_data() -> None:
    log = CRASH.format(1, 1).replace("/code/train.py", "/data/projects/mine/train.py")
    assert judge(life(end(log=log)), []).cause == "code"
    assert judge(life(end(log=log.replace("mine/train.py", "mine/data/pairs.py"))), []).cause == "data"


def test_a_warning_is_no_cause() -> None:
    log = "UserWarning: CUDA initialization: Found no NVIDIA driver on your system.\n" + CRASH.format(1, 1)
    assert judge(life(end(log=log)), []).cause == "code"


def test_words_of_slurm_and_words_like_them() -> None:
    log = "NCCL_TIMEOUT was set\nPREEMPTED is the name of a variable\n"
    assert judge(life(end(code=None, signal=11, log=log)), []).cause == "code"
    ended = "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-01-05T10:11:12 {}***\n"
    for words, cause in (("", "stopped"), ("DUE TO TIME LIMIT ", "time_limit"), ("DUE TO NODE FAILURE ", "node")):
        number = 9 if cause == "node" else 15
        assert judge(life(end(code=None, signal=number, log=ended.format(words))), []).cause == cause


def test_a_kill_at_the_same_step_on_two_nodes_is_the_code() -> None:
    kill = dict(code=None, signal=9)
    verdict = judge_lives([life(end(0, **kill), end(1, **RUNS_ON)), life(end(0, **RUNS_ON), end(1, **kill))])[1]
    assert (verdict.cause, verdict.stop) == ("code", True)
    verdict = judge_lives([life(end(0, **kill), end(1, **RUNS_ON)), life(end(0, **kill), end(1, **RUNS_ON))])[1]
    assert (verdict.cause, verdict.node, verdict.stop, verdict.exclude) == ("node", "node1", False, True)


def test_lost_nodes_are_never_the_code() -> None:
    lost = [life(end(0, 86), end(1, **RUNS_ON), lost_nodes={name: "silent"}) for name in ("node2", "node1")]
    assert [(verdict.cause, verdict.stop) for verdict in judge_lives(lost)] == [("node", False)] * 2
    assert judge_lives([lost[0], lost[0]])[1].exclude


def test_many_nodes_lost_at_once_are_the_network() -> None:
    ends = [end(rank, **RUNS_ON) for rank in range(4)]
    verdict = judge(life(*ends, lost_nodes=dict.fromkeys(["node1", "node2", "node3"], "silent")), [])
    assert (verdict.cause, verdict.node) == ("network", None)


def test_the_first_to_end_is_the_cause_and_not_those_that_follow() -> None:
    lost = "RuntimeError: [../gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.0.0.1]:4711\n"
    ends = [
        end(0, 1, at=1.0, log=lost),
        end(1, 1, at=2.0, log=CRASH.format(1, 1)),
        end(2, 86, at=0.5),
        end(3, **RUNS_ON),
    ]
    assert judge(life(*ends), []).node == "node2"
    assert judge(life(*ends[:1], *ends[2:]), []).cause == "network"


def test_only_the_last_life_in_a_log_counts() -> None:
    log = (
        CRASH.format(1, 1) + "=== life 1 node1 rank 0 2026-01-05T10:11:12 ===\nOSError: [Errno 5] Input/output error\n"
    )
    assert judge(life(end(log=log)), []).cause == "storage"


def test_a_chain_without_progress_stops() -> None:
    lives = [life(end(log=CRASH.format(1, word)), number=n, step=10 - n) for n, word in enumerate("abcdefgh")]
    assert [verdict.stop for verdict in judge_lives(lives, max_stuck=4)][:5] == [False] * 4 + [True]
    moving = [replace(one, saved_step=10 * one.life) for one in lives]
    assert not any(verdict.stop for verdict in judge_lives(moving, max_stuck=4))
    limits = [replace(one, ranks=(end(code=85),), notice="time_limit", saved_step=3) for one in lives]
    assert judge_lives(limits, max_stuck=4)[4].stop


@pytest.mark.parametrize(
    "notice, code, cause, stop",
    [
        ("stop_file", 85, "stopped", True),
        ("cancel", 85, "stopped", True),
        ("time_limit", 85, "time_limit", False),
        ("preemption", None, "preemption", False),
        (None, 0, "finished", True),
    ],
)
def test_asked_to_end(notice: str | None, code: int | None, cause: str, stop: bool) -> None:
    verdict = judge(life(end(0, code), end(1, code), notice=notice), [])
    assert (verdict.cause, verdict.stop) == (cause, stop)


def test_what_differs_from_one_time_to_the_next_is_no_part_of_a_signature() -> None:
    assert normalise("rank 3 on node17: 0x7f3a at 10.0.0.3:4711, '/run/a/step_100': 1.5e-3") == normalise(
        "rank 5 on node2: 0x1 at 10.0.0.4:17, '/run/b/step_7': 2"
    )
    assert normalise("a is missing") != normalise("b is missing")


def test_verdicts_survive_in_the_events_of_a_run() -> None:
    verdict = judge(life(end(log=CRASH.format(1, 1)), saved_step=5), [])
    events = [
        {"event": "life_end"},
        json.loads(json.dumps({"event": "verdict", "time": 1.0, **verdict_facts(verdict)})),
    ]
    assert recall_verdicts(events) == [verdict]
    again = [*events, {"event": "job_start"}, *events[1:]]
    assert recall_verdicts(again) == [verdict, verdict]
    events[1]["stop"] = True
    assert len(recall_verdicts([*events, {"event": "submitted"}, *again[-1:]])) == 1, "somebody has mended something"


def test_bad_nodes_are_remembered_by_many_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cluster" / "bad_nodes.json"
    assert load_bad_nodes(path) == {}
    threads = [
        threading.Thread(target=remember_bad_node, args=(path, f"node{n % 2}", "runs/a", "ECC")) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {node: len(entries) for node, entries in load_bad_nodes(path).items()} == {"node0": 4, "node1": 4}
    path.write_text("[")
    with pytest.raises(UserError, match="bad_nodes.json"):
        load_bad_nodes(path)
