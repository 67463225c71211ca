"""Preflight: what it makes of facts and rates, real exchanges on this machine, and sick nodes and slow cables of a cluster."""

import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster

from launch.preflight import LINK_SHARES, compare_nodes, examine, explain_rates, reference, run_here
from pretrain.doctor.link import count_rounds, pair_up
from pretrain.doctor.node import examine_node

GOOD = {
    "memory_gib": 100.0, "available_gib": 90.0, "code": "a", "python": "3.11.7", "packages": {"torch": "2.13.0"},
    "write_mb_s": 200.0, "matmul_gflops": 80.0, "gpus": [], "problems": [], "token": "t", "folder": "/run", "time": 5.0,
}  # fmt: skip


def test_each_pair_meets_once_and_rounds_are_disjoint() -> None:
    for count in range(2, 18):
        pairs = [pair for number in range(count_rounds(count)) for pair in pair_up(count, number)]
        assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
        for number in range(count_rounds(count)):
            nodes = [node for pair in pair_up(count, number) for node in pair]
            assert len(nodes) == len(set(nodes)) >= count - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": "b"}, "another code"),
        ({"packages": {"torch": "2.12.0"}}, "torch 2.12.0 instead of 2.13.0"),
        ({"packages": {}}, "torch missing instead of 2.13.0"),
        ({"gpus": [{"name": "A"}]}, "number of GPUs"),
        ({"problems": ["/run: cannot be written: Read-only file system"]}, "Read-only"),
        ({"available_gib": 20.0}, "GiB of free memory"),
        ({"token": None}, "not shared"),
        ({"time": 300.0}, "clock"),
        ({"matmul_gflops": 30.0}, "GFLOP/s"),
        ({"write_mb_s": 3.0}, "MB/s written"),
    ],
)
def test_the_node_that_differs_is_named(change: dict, reason: str) -> None:
    facts = {f"node{number}": dict(GOOD) for number in range(4)}
    assert compare_nodes(facts, "t").facts == compare_nodes(facts, "t").rates == {}
    facts["node2"] |= change
    found = compare_nodes(facts, "t")
    named = found.facts | found.rates
    assert list(named) == ["node2"] and reason in named["node2"][0] and not found.everywhere


def test_what_is_wrong_everywhere_is_no_nodes_fault() -> None:
    facts = {f"node{number}": {**GOOD, "problems": ["/data: no such folder"]} for number in range(3)}
    found = compare_nodes(facts, "t")
    assert found.facts == {} and found.everywhere == ["/data: no such folder (on 3 of 3 nodes)"]
    halves = {f"node{number}": {**GOOD, "code": "ab"[number % 2]} for number in range(4)}
    assert compare_nodes(halves, "t").facts == {}, "nobody can say which half is right"


def draw_rates(count: int, seed: int, slow_nodes=(), slow_pairs=()) -> dict[tuple[str, str], float]:
    """Rates that differ by a third, as on busy machines."""
    draw = random.Random(seed)
    rates = {}
    for a in range(count):
        for b in range(a + 1, count):
            slow = a in slow_nodes or b in slow_nodes or (a, b) in slow_pairs
            rates[f"n{a}", f"n{b}"] = draw.uniform(300, 500) * (0.1 if slow else 1)
    return rates


@pytest.mark.parametrize("seed", range(20))
def test_a_slow_node_is_told_from_a_slow_link(seed: int) -> None:
    def explain(rates):
        return explain_rates(rates, LINK_SHARES["sockets"] * reference(rates))

    for count in (3, 4, 8, 16):
        assert explain(draw_rates(count, seed)) == ([], [])
        assert explain(draw_rates(count, seed, slow_nodes=[1])) == (["n1"], [])
    for count in (4, 8, 16):
        assert explain(draw_rates(count, seed, slow_pairs=[(1, 2)])) == ([], [("n1", "n2")])
    assert explain(draw_rates(8, seed, slow_nodes=[5], slow_pairs=[(1, 2)])) == (["n5"], [("n1", "n2")])
    assert explain(draw_rates(8, seed, slow_nodes=[0, 5])) == (["n0", "n5"], [])


class Nodes:
    """Nodes of whose probes the answers are known."""

    def __init__(self, names: list[str], slow: set[str] = frozenset(), broken: set[str] = frozenset()) -> None:
        self.names, self.slow, self.broken, self.calls = names, slow, broken, 0

    def run_on_nodes(self, nodes: list[str], command: list[str], timeout_s: float):
        self.calls += 1
        if "node" in command:
            token = (Path(command[command.index("--folder") + 1]) / "preflight-token").read_text()
            return {node: (0, json.dumps({**GOOD, "token": token})) for node in nodes}
        if self.broken & set(nodes):  # as a collective library fails: all hang with it
            return {node: (None, "") for node in nodes}
        rate = {node: 10.0 if node in self.slow else 400.0 for node in nodes}
        return {
            node: (
                0,
                json.dumps({"mb_s": {str(n): min(rate[node], rate[o]) for n, o in enumerate(nodes) if o != node}}),
            )
            for node in nodes
        }


def test_a_node_that_breaks_the_group_is_found_by_halves(tmp_path: Path) -> None:
    names = [f"node{number}" for number in range(8)]
    for bad in names:
        nodes = Nodes(names, broken={bad})
        assert list(examine(nodes.run_on_nodes, names, None, [], tmp_path).bad) == [bad]
        assert nodes.calls < 16
    assert list(examine(Nodes(names, slow={"node3"}).run_on_nodes, names, None, [], tmp_path).bad) == ["node3"]
    assert examine(Nodes(names).run_on_nodes, names, None, [], tmp_path).bad == {}
    broken = examine(Nodes(names, broken=set(names)).run_on_nodes, names, None, [], tmp_path)
    assert broken.bad == {} and "no two nodes" in broken.everywhere[0]
    mute = examine(lambda nodes, command, timeout_s: dict.fromkeys(nodes, (1, "no module")), names, None, [], tmp_path)
    assert mute.bad == {} and "no module" in mute.everywhere[0], "nobody loses all nodes to a broken question"
    calls = []

    def answer_late(asked: list[str], command: list[str], timeout_s: float):
        calls.append(asked)
        found = Nodes(names).run_on_nodes(asked, command, timeout_s)
        return {**found, "node6": (None, "")} if len(calls) == 1 else found

    assert examine(answer_late, names, None, [], tmp_path).bad == {} and calls[1] == ["node6"]
    assert list(tmp_path.iterdir()) == []


def test_a_node_looks_at_itself(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {tmp_path / 'run'}\ndata: {{path: {shards / 'train'}}}\n")
    facts = examine_node(str(config), [], None)
    assert facts["problems"] == [] and facts["shards"] == 6 and facts["matmul_gflops"] > 0 and facts["write_mb_s"] > 0
    assert facts["packages"]["numpy"] and list((tmp_path / "run").iterdir()) == []
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", shards / "train", broken], check=True)
    os.truncate(sorted(broken.glob("*.tar"))[-1], 1000)
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA X, 81559, 3, 550.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("pretrain.doctor.node.try_gpus", lambda problems: [1.0])
    problems = examine_node(str(config), [f"data.path={broken}"], "/proc/nothing")["problems"]
    assert any("/proc/nothing: cannot be written" in text for text in problems)
    assert any("00002.tar" in text for text in problems)
    assert any("3 uncorrected memory errors" in text for text in problems)


def test_processes_of_this_machine_exchange_data() -> None:
    names = ["a", "b", "c"]
    found = run_here(names, [sys.executable, "-m", "pretrain", "doctor", "link", "--seconds", "0.2"], 60)
    for rank, name in enumerate(names):
        code, text = found[name]
        said = json.loads(text.splitlines()[-1])
        assert code == 0 and set(said["mb_s"]) == {str(other) for other in range(len(names)) if other != rank}, text
        assert all(rate > 1 for rate in said["mb_s"].values()) and abs(said["offset_s"]) < 0.5


def measure_by_gloo(rank: int, count: int, port: int, queue: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from pretrain.doctor.link import measure_by_torch

    queue.put((rank, measure_by_torch(rank, count, ("127.0.0.1", port), count_rounds(count), 0.2, "gloo")))


def test_the_library_of_training_measures_too() -> None:
    """By gloo, with the code that drives NCCL where there are GPUs."""
    context = multiprocessing.get_context("forkserver")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    queue = context.Queue()
    processes = [context.Process(target=measure_by_gloo, args=(rank, 2, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    assert {rank: set(facts["mb_s"]) for rank, facts in found.items()} == {0: {"1"}, 1: {"0"}}
    assert all(rate > 1 for facts in found.values() for rate in facts["mb_s"].values())


def test_a_node_that_does_not_come_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "NNODES": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = (
        "import sys, pretrain.doctor.link as link; link.MEET_S = 3; link.PAIR_WAIT_S = 1;"
        "sys.exit(link.print_link('sockets', None, 0.1))"
    )
    pipe = {"stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen(command, env={**environment, "NODE_RANK": str(rank)}, cwd=ROOT, **pipe) for rank in (0, 2)
    ]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in ranks]
    assert said[0]["mb_s"]["1"] is None and said[1]["mb_s"]["1"] is None
    assert said[0]["mb_s"]["2"] > 1 and said[1]["mb_s"]["0"] > 1


# --- on a real cluster ---------------------------------------------------------------------------------------------------


def make_sick(cluster: Cluster, node: str) -> None:
    """A driver that has lost its GPU, as nvidia-smi tells it."""
    program = cluster.place / "nodes" / node / "bin" / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot the system'\nexit 15\n"
    )
    program.chmod(0o755)


def slow_link(cluster: Cluster, node: str, peer: int, rate: str) -> None:
    """Only what `node` sends to one other is slow."""
    for words in (
        "qdisc add dev eth0 root handle 1: htb default 10",
        "class add dev eth0 parent 1: classid 1:10 htb rate 40gbit",
        f"class add dev eth0 parent 1: classid 1:20 htb rate {rate} burst 64kb",
        f"filter add dev eth0 parent 1: protocol ip u32 match ip dst 10.77.0.{10 + peer}/32 flowid 1:20",
    ):
        cluster.lab("exec", "-n", node, "tc", *words.split())


def run_preflight(cluster: Cluster, folder: Path, nodes: int) -> tuple[int, str, float]:
    """By hand, in an allocation of all nodes."""
    file = cluster.write_job(folder, nodes=nodes, gpus_per_node=1, preflight={"enabled": True})
    began_s = time.monotonic()
    command = ["salloc", "-Q", f"-N{nodes}", "--exclusive", "-t", "5"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "launch", "preflight", str(file)],
        env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr, time.monotonic() - began_s


def named_bad(text: str) -> set[str]:
    return {line.split()[0] for line in text.splitlines() if line[16:22].strip() == "BAD"}


@pytest.mark.slurm
def test_a_sick_node_and_a_slow_one_are_named(tmp_path: Path) -> None:
    with Cluster.up(tmp_path, 4, "--gpus", "0") as cluster:
        make_sick(cluster, "node2")
        cluster.lab("slow", "node3", "10mbit")
        code, text, _ = run_preflight(cluster, tmp_path / "job", 4)
        assert code == 1 and named_bad(text) == {"node2", "node3"}, text
        assert "GPU is lost" in text and "slow to all others" in text


@pytest.mark.slurm
@pytest.mark.faults
def test_twenty_clean_runs_accuse_nobody(tmp_path: Path) -> None:
    with Cluster.up(tmp_path, 8, "--gpus", "0", "--cpus", "8") as cluster:
        times = []
        for _ in range(20):
            code, text, took_s = run_preflight(cluster, tmp_path / "job", 8)
            assert code == 0 and named_bad(text) == set(), text
            times.append(took_s)
    print(f"20 clean runs: median {statistics.median(times):.1f} s, longest {max(times):.1f} s")


@pytest.mark.slurm
@pytest.mark.faults
def test_eight_nodes_with_a_slow_link_and_a_sick_node(tmp_path: Path) -> None:
    with Cluster.up(tmp_path, 8, "--gpus", "0", "--cpus", "8") as cluster:
        slow_link(cluster, "node4", 7, "20mbit")
        make_sick(cluster, "node2")
        code, text, took_s = run_preflight(cluster, tmp_path / "job", 8)
        assert code == 1 and named_bad(text) == {"node2", "node7"}, text
        assert "the link node4 - node7 carries" in text and took_s < 60
        print(f"{text}\n{took_s:.1f} s")
        cluster.lab("slow", "node6", "20mbit")
        code, text, took_s = run_preflight(cluster, tmp_path / "job", 8)
        assert named_bad(text) == {"node2", "node6", "node7"} and took_s < 60, text
        print(f"{text}\n{took_s:.1f} s")
