"""The parts of which supervisors are made, one by one."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT
from processes import is_running

from launch.agent import expand_nodes
from launch.events import append_event, read_launch_events
from launch.heartbeat import Heart, load_secret, seal, unseal
from launch.job import JobConfig, resolve_job
from launch.judge import Verdict
from launch.ladder import choose_repair
from launch.leader import Leader, side
from launch.ranks import Ranks, check_gpus, log_tail, rank_places
from launch.shared import Shared
from pretrain.config import check_config


def verdict(**facts) -> Verdict:
    return Verdict(
        **{**dict(cause="node", node="b", reason="why", excerpt="", signature="s", step=1, life=1, stop=False), **facts}
    )


@pytest.mark.parametrize(
    ("case", "action", "nodes", "spare"),
    [
        ({"bad": []}, "restart", ("a", "b", "c"), None),
        ({"bad": ["b"]}, "swap", ("a", "s", "c"), "s"),
        ({"bad": ["a", "b"]}, "shrink", ("s", "c"), "s"),
        ({"bad": ["b"], "spares": []}, "shrink", ("a", "c"), None),
        ({"bad": ["b", "s"], "min_nodes": 3}, "requeue", (), None),
        ({"active": ["a", "c"], "bad": []}, "grow", ("a", "c", "s"), "s"),
        ({"bad": ["b"], "spares": [], "fits": lambda nodes: nodes in (1, 3), "min_nodes": 1}, "shrink", ("a",), None),
        ({"bad": [], "restarts_left": 0}, "stop", (), None),
        ({"bad": [], "verdict": verdict(stop=True)}, "stop", (), None),
    ],
)
def test_the_cheapest_repair_that_can_help(case, action, nodes, spare):
    given = {"verdict": verdict(), "active": ["a", "b", "c"], "spares": ["s"], "wanted": 3, "min_nodes": 2, **case}
    repair = choose_repair(**given)
    assert (repair.action, repair.nodes, repair.spare) == (action, nodes, spare)
    if action == "requeue":
        assert set(repair.excluded) == {"b", "s"}


def test_most_half_few():
    assert [side(*counts) for counts in ((3, 2), (2, 1), (4, 2), (3, 1), (1, 1))] == [
        "most",
        "half",
        "half",
        "few",
        "most",
    ]


def test_lists_of_hosts_as_slurm_writes_them():
    assert expand_nodes("node[1-3,07],gpu-a1") == ["node1", "node2", "node3", "node07", "gpu-a1"]
    assert expand_nodes("r[1-2]n[08-10].x") == ["r1n08.x", "r1n09.x", "r1n10.x", "r2n08.x", "r2n09.x", "r2n10.x"]
    assert expand_nodes("") == []


def test_a_beat_that_was_not_sealed_with_the_secret_says_nothing():
    data = seal({"node": "a"}, b"key")
    assert unseal(data, b"key") == {"node": "a"}
    assert unseal(data, b"another") is None
    assert unseal(data[:-1] + b"?", b"key") is None
    assert unseal(b"", b"key") is None


def test_all_supervisors_have_one_secret_and_nobody_else_can_read_it(tmp_path):
    assert load_secret(tmp_path) == load_secret(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def make_hearts(**beat_s: float) -> dict[str, Heart]:
    hearts = {name: Heart(name, "job", b"key", seconds, lambda: None) for name, seconds in beat_s.items()}
    for heart in hearts.values():
        heart.meet({name: ("127.0.0.1", other.port) for name, other in hearts.items()})
        heart.say({"phase": "idle"}, tuple(hearts))
        heart.start()
    return hearts


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_beats_carry_news_at_once_and_a_dead_supervisor_is_told_from_a_frozen_one():
    hearts = make_hearts(a=0.2, b=0.2)
    a, b = hearts["a"], hearts["b"]
    try:
        wait_until(lambda: "b" in a.heard())
        b.say({"phase": "running"}, ("a",))
        wait_until(lambda: a.heard()["b"]["phase"] == "running")
        assert a.silence_s("b") < 0.5
        replayed = seal({"node": "b", "job": "job", "stamp": [1, 1], "phase": "old"}, b"key")
        b.datagrams.sendto(replayed, ("127.0.0.1", a.port))
        time.sleep(0.3)
        assert a.heard()["b"]["phase"] == "running", "an old beat changes nothing"
        b.targets = ()  # silent, but its kernel still accepts connections
        wait_until(lambda: a.answer("b") == "accepts")
        b.close()
        wait_until(lambda: a.answer("b") == "refuses")
    finally:
        a.close()
        b.close()


def test_who_was_held_up_blames_nobody_for_that_time():
    hearts = make_hearts(a=0.2, b=0.2)
    a, b = hearts["a"], hearts["b"]
    try:
        wait_until(lambda: "b" in a.heard())
        b.close()
        time.sleep(0.5)
        before_s = a.silence_s("b")
        a.excuse(before_s)
        assert a.silence_s("b") < before_s - 0.3
    finally:
        a.close()


def test_a_life_and_a_generation_are_begun_once(tmp_path):
    one, other = (Shared(tmp_path, "job", node, 2) for node in "ab")
    assert (one.claim_generation(1), other.claim_generation(1)) == (True, False)
    (tmp_path / "run.lock").touch()
    assert one.claim_life(None, 1) == 1
    assert not (tmp_path / "run.lock").exists(), "what an older life still writes is to find out"
    assert other.claim_life(1, 1) is None
    assert other.claim_generation(2)
    (tmp_path / "run.lock").touch()
    assert one.claim_life(2, 1) is None, "a leader of an older generation begins nothing"
    assert (tmp_path / "run.lock").exists()
    assert other.claim_life(2, 2) == 2
    assert Shared(tmp_path, "next job", "a", 2).claim_life(None, 1) == 3


class Silence:
    """A heart that hears what a test says: seconds of silence by node."""

    def __init__(self, **silence_s: float) -> None:
        self.silences = silence_s

    def silence_s(self, node: str) -> float:
        return self.silences.get(node, 0.0)

    def answer(self, node: str) -> str | None:
        return "no answer" if self.silence_s(node) > 1 else None


def make_leader(folder, **silence_s: float) -> Leader:
    values = {"name": "job", "command": ["true"], "nodes": 1 + len(silence_s), "gpus_per_node": 1, "time_limit_min": 10}
    job = resolve_job(check_config({**values, "run": str(folder)}, JobConfig, "job"))
    shared = Shared(folder, "job", "a", job.nodes)
    shared.start()
    leader = Leader(job, ["a", *silence_s], "a", 1, Silence(**silence_s), shared)
    leader.members = list(leader.allocation)
    return leader


def decide(leader: Leader) -> bool:
    silent = {node: "silent" for node in leader.members if leader.heart.silence_s(node) > 4}
    if not leader.may_decide(silent) and leader.claim is not None:
        leader.claim.exception(timeout=10)
        return leader.may_decide(silent)
    return leader.claim is None and leader.may_decide(silent)


def test_a_leader_that_hears_most_nodes_decides_alone(tmp_path):
    leader = make_leader(tmp_path, b=0.1, c=5.0)
    assert decide(leader) and leader.generation == 1


def test_a_leader_that_hears_half_of_them_has_to_win_the_next_generation(tmp_path):
    leader = make_leader(tmp_path, b=5.0)
    assert decide(leader) and leader.leads and leader.generation == 2
    assert not leader.shared.claim_generation(2)
    late = make_leader(tmp_path, b=5.0)  # the same once more, but another one was faster
    assert not decide(late) and not late.leads


def test_a_leader_waits_while_others_may_be_falling_silent_too(tmp_path):
    leader = make_leader(tmp_path, b=3.0, c=5.0)
    assert not decide(leader) and leader.leads and leader.claim is None


def test_a_leader_that_is_cut_off_from_most_nodes_gives_way(tmp_path):
    leader = make_leader(tmp_path, b=5.0, c=5.0)
    assert not leader.may_decide({"b": "cut", "c": "cut"})
    assert not leader.leads


def start_one(folder, code: str) -> Ranks:
    ranks = Ranks(folder, "a")
    places = rank_places(["a"], "a", 1, ("127.0.0.1", 1), 3, {"GIVEN": "x y"})
    ranks.start(3, [sys.executable, "-c", code], places, str(folder), None)
    return ranks


def wait_for_end(ranks: Ranks) -> None:
    end = time.monotonic() + 20
    while ranks.running():
        assert time.monotonic() < end
        time.sleep(0.02)
        ranks.poll()


def test_a_rank_has_its_place_its_log_and_its_end(tmp_path):
    ranks = start_one(tmp_path, "import os; print(os.environ['GIVEN'], os.environ['NODE_RANK']); raise SystemExit(7)")
    wait_for_end(ranks)
    code, number, at = ranks.facts()["0"]
    assert (code, number) == (7, None) and time.time() - at < 5
    assert log_tail(tmp_path, 0, 3) == "x y 0\n"
    assert log_tail(tmp_path, 0, 4) == "", "of another life"


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); raise SystemExit(1)"
    ranks = start_one(tmp_path, code)
    wait_for_end(ranks)
    pid = int(log_tail(tmp_path, 0, 3))
    wait_until(lambda: not is_running(pid))


def test_ranks_die_with_their_supervisor(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from launch.ranks import Ranks, rank_places\n"
        "ranks = Ranks(Path(sys.argv[1]), 'a')\n"
        "ranks.start(1, ['sleep', '1000'], rank_places(['a'], 'a', 1, ('h', 1), 1, {}), None, None)\n"
        "print(ranks.ranks[0].process.pid, flush=True); time.sleep(1000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(supervisor.stdout.readline())
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    wait_until(lambda: not is_running(pid))


def test_a_command_that_is_not_there_is_told_as_a_shell_does(tmp_path):
    ranks = Ranks(tmp_path, "a")
    ranks.start(1, ["no-such-program"], rank_places(["a"], "a", 1, ("h", 1), 1, {}), None, None)
    assert ranks.facts()["0"][0] == 127
    assert log_tail(tmp_path, 0, 1) == "no-such-program: No such file or directory\n"


def test_the_place_of_a_rank():
    place = rank_places(["a", "b"], "b", 2, ("10.0.0.1", 123), 4, {"RANK": "hidden"})[1]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [place[name] for name in names] == ["3", "1", "4", "2", "1", "10.0.0.1", "123"]
    assert place["PRETRAIN_RESTART"] == "4"


@pytest.mark.parametrize(
    ("environment", "driver", "told"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None, None),
        ({}, None, None),
        ({}, 2, None),
        ({}, 1, "set gpus_per_node to what the node has"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 2, "unset CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, 2, "--gpus-per-task=1"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPU_BIND": "single:1"}, 2, "--gpu-bind=single:1"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, 2, "ask for --gpus-per-node=2"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, "0 GPUs visible"),
    ],
)
def test_fewer_gpus_than_ranks_are_told_with_the_reason(monkeypatch, environment, driver, told):
    for name in list(os.environ):
        if name.startswith(("CUDA_", "SLURM_")):
            monkeypatch.delenv(name)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    found = check_gpus(2, lambda: driver)
    assert (found is None) == (told is None)
    assert told is None or told in found


def test_events_of_which_a_crash_has_cut_the_last_line(tmp_path):
    append_event(tmp_path, "fault", node="a")
    with open(tmp_path / "launch/events.jsonl", "a") as file:
        file.write('{"event": "cut')
    append_event(tmp_path, "repair", action="restart", time=5.0)
    assert [event["event"] for event in read_launch_events(tmp_path)] == ["fault", "repair"]
    assert read_launch_events(tmp_path)[1]["time"] == 5.0
    assert read_launch_events(tmp_path / "nothing") == []
