"""Faults of nodes on a real Slurm that itself would not notice them for five minutes: when they are noticed, what they are
called, when the run trains again, and that nothing of it shows in the run. `make test-faults`; FAULT_ROUNDS=1 for one round.

The times go to FAULT_TIMES=FILE.jsonl, and at the end a table of them, as in docs/launch.md, to FILE.md.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from supervised import TRAINER, Recorded

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

ROUNDS = int(os.environ.get("FAULT_ROUNDS", 5))
STEPS = 160
NOTICED_S = {"kill": 1.0, "freeze": 5.0, "crash": 5.0, "cut": 5.0}
TRAINING_S = 15.0
TIMES = Path(os.environ.get("FAULT_TIMES") or Path(tempfile.mkdtemp()) / "times.jsonl")


def submit(cluster: Cluster, folder: Path, **keys) -> tuple[Recorded, object]:
    """2 nodes x 2 ranks and a spare node."""
    run = folder / "run"
    command = [sys.executable, str(TRAINER), str(run), str(keys.pop("steps", STEPS)), "0.1"]
    environment = {"PYTHONPATH": str(ROOT)}
    keys = {"spare_nodes": 1, **keys}
    job = cluster.submit(folder, command=command, run=str(run), environment=environment, **keys)
    return Recorded(run), job


def rank_on(node: str, folder: Path) -> int:
    """The process number, on this machine, of a rank of a node."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if str(TRAINER).encode() in words and str(folder).encode() in words:
                if f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    return int(process.name)
        except OSError:
            continue  # it has just ended
    raise AssertionError(f"no rank of {node} found")


def break_node(cluster: Cluster, recorded: Recorded, fault: str, node: str) -> float:
    """When it was broken, in unix seconds: when the command that breaks it, which takes some tenths of a second, is through."""
    pid = rank_on(node, recorded.run) if fault == "kill" else None
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    else:
        cluster.lab(fault, node)
    return time.time()


def mend_node(cluster: Cluster, fault: str, node: str) -> None:
    mend = {"freeze": "thaw", "cut": "heal"}.get(fault)
    if mend:
        cluster.lab(mend, node)


@pytest.mark.parametrize("place", ["node1", "node2"])
@pytest.mark.parametrize("fault", list(NOTICED_S))
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_fault_is_noticed_named_and_repaired(tmp_path, fault, place, number):
    with Cluster.up(tmp_path, 3, "--node-timeout", "300") as cluster:
        recorded, job = submit(cluster, tmp_path / "job")
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        at = break_node(cluster, recorded, fault, place)
        noticed = recorded.wait_for_event("fault", node=place)
        assert noticed["kind"] == {"kill": "exit", "freeze": "frozen", "crash": "silent", "cut": "cut"}[fault]
        training = recorded.wait_for_event("training", count=2)
        noticed_s, training_s = noticed["time"] - at, training["time"] - noticed["time"]
        with open(TIMES, "a") as file:
            file.write(json.dumps([fault, place, noticed_s, training_s]) + "\n")
        mend_node(cluster, fault, place)
        recorded.wait_for(lambda: (recorded.run / "done.json").exists(), "the end of the run")
        recorded.check_exact(STEPS)
        # Nobody else is accused, but by a first node that hears nobody, before it knows that it is the one cut off.
        assert {event["node"] for event in recorded.events("fault")} == {place}
        repair = recorded.events("repair")[0]["action"]
        assert repair == ("restart" if fault == "kill" else "swap")
        assert noticed_s < NOTICED_S[fault]
        assert training_s < TRAINING_S
        if (fault, place) == ("crash", "node1"):  # the batch script has died: the leader has given the nodes back
            job.wait_for_end("CANCELLED", "COMPLETING")
        else:  # COMPLETING: Slurm still waits for the word of a node that is dead
            job.wait_for_end("COMPLETED", *["COMPLETING"] * (fault == "crash"))


def test_the_table():
    """Last in this file: what was measured."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in TIMES.read_text().splitlines():
        fault, place, noticed_s, training_s = json.loads(line)
        found.setdefault((fault, place), []).append((noticed_s, training_s))
    lines = ["| fault | node | noticed after, s (median, most) | training again after, s (median, most) | runs |"]
    lines.append("|---|---|---|---|---|")
    for (fault, place), times in sorted(found.items()):
        columns = [f"{statistics.median(values):.1f}, {max(values):.1f}" for values in zip(*times, strict=True)]
        lines.append(f"| {fault} | {place} | {columns[0]} | {columns[1]} | {len(times)} |")
    print("\n".join(lines))
    TIMES.with_suffix(".md").write_text("\n".join(lines) + "\n")
