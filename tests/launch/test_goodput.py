"""Ten minutes with a fault a minute on a real Slurm: the goodput, and what the forecast said of it before."""

import random
import statistics
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, Job

from launch.events import read_launch_events
from launch.forecast import Forecast, forecast
from launch.ledger import Ledger, read_ledger

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

TRAINER = Path(__file__).with_name("stand_in_trainer.py")
MINUTES = 10
STEP_S, SAVE_STEPS = 0.2, 25
NODES, SPARES = 4, 6
# One a minute, each on a node that has not failed yet where there is one: a node that fails twice is left out.
FAULTS = ("kill", "kill", "freeze", "kill", "cut", "kill", "crash", "kill", "kill", "freeze")
RECOVERS_S = 25  # after which a frozen or cut-off node is well again


class FaultyRun:
    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.draw, self.hit = cluster, random.Random(7), {}
        command = [sys.executable, str(TRAINER), "run", "1000000", str(STEP_S), str(SAVE_STEPS)]
        self.job: Job = cluster.submit(
            folder, command=command, nodes=NODES, spare_nodes=SPARES, min_nodes=2, gpus_per_node=1, time_limit_min=30
        )
        self.run = Path(self.job.run)
        self.healing: list[tuple[float, tuple[str, ...]]] = []

    def events(self, name: str) -> list[dict]:
        return [event for event in read_launch_events(self.run) if event["event"] == name]

    def trains(self, lives: int) -> bool:
        return len(self.events("training")) >= lives

    def wait(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            for due_s, words in [entry for entry in self.healing if entry[0] <= time.monotonic()]:
                self.cluster.lab(*words)
                self.healing.remove((due_s, words))
            time.sleep(0.2)

    def break_something(self, fault: str) -> None:
        active = self.events("life_start")[-1]["nodes"]
        node = min(active, key=lambda name: (self.hit.get(name, 0), self.draw.random()))
        self.hit[node] = self.hit.get(node, 0) + 1
        if fault == "kill":  # in its own list of processes, where only this node's are
            self.cluster.lab("exec", "-n", node, "sh", "-c", "kill -9 $(pgrep -o -f '[s]tand_in_trainer.py')")
        else:
            self.cluster.lab(fault, node)
            healed = {"freeze": "thaw", "cut": "heal"}.get(fault)
            if healed:
                self.healing.append((time.monotonic() + RECOVERS_S, (healed, node)))

    def stop(self) -> Ledger:
        (self.run / "STOP").touch()
        # Not for Slurm's word on the job: it waits for the node that has crashed.
        self.cluster.wait_for(lambda: self.events("job_end"), self.job)
        return read_ledger(self.run)


def cost_of_faults(run: Path) -> tuple[dict[bool, float], float]:
    """Seconds to notice, by whether a process had ended (True) or a node was silent, and from there to the next step."""
    events = read_launch_events(run)
    notice: dict[bool, list[float]] = {True: [], False: []}
    restarts, since_s = [], None
    for event in events:
        if event["event"] == "fault" and since_s is None:
            since_s = event["time"]
            if event.get("happened_s"):
                notice[event["kind"] == "exit"].append(event["time"] - event["happened_s"])
        if event["event"] == "training" and since_s is not None:
            restarts.append(event["time"] - since_s)
            since_s = None
    return {kind: statistics.mean(times) for kind, times in notice.items() if times}, statistics.mean(restarts)


def trained_share(ledger: Ledger) -> float:
    """The productive share from the first step on, for a forecast knows of no start."""
    booked = ledger.seconds
    return booked["productive"] / (ledger.total_s - booked["queue"] - booked["start"])


def predict(notice: dict[bool, float], restart_s: float) -> Forecast:
    ended = FAULTS.count("kill") / len(FAULTS)
    return forecast(
        nodes=1,
        mtbf_h_per_node=1 / 60,
        detect_s=ended * notice[True] + (1 - ended) * notice[False],
        restart_s=restart_s,
        save_stall_s=0.01,
        save_every_s=STEP_S * SAVE_STEPS,
        regular=True,
    )


def test_goodput_with_a_fault_a_minute(tmp_path: Path) -> None:
    with Cluster.up(tmp_path, NODES + SPARES, "--node-timeout", "300") as cluster:
        # What faults cost here is measured first, with two of each kind.
        before = FaultyRun(cluster, tmp_path / "before")
        for number, fault in enumerate(("kill", "freeze", "kill", "freeze")):
            before.cluster.wait_for(lambda lives=number + 1: before.trains(lives), before.job)
            before.wait(time.monotonic() + 8)
            before.break_something(fault)
        before.cluster.wait_for(lambda: before.trains(5), before.job)
        before.wait(time.monotonic() + RECOVERS_S + 1)
        before.stop()
        notice, restart_s = cost_of_faults(before.run)
        expected = predict(notice, restart_s)
        print(f"\nto notice: {notice[True]:.2f} s (ended), {notice[False]:.2f} s (silent); restart {restart_s:.2f} s")
        print(f"forecast: goodput {expected.goodput:.1%}", flush=True)

        faulty = FaultyRun(cluster, tmp_path / "run")
        faulty.cluster.wait_for(lambda: faulty.trains(1), faulty.job)
        began_s = time.monotonic()
        for minute, fault in enumerate(FAULTS[:MINUTES]):
            faulty.wait(began_s + 60 * minute + faulty.draw.uniform(20, 40))
            faulty.cluster.wait_for(lambda lives=minute + 1: faulty.trains(lives), faulty.job)
            faulty.break_something(fault)
        faulty.wait(began_s + 60 * MINUTES)
        ledger = faulty.stop()
        found = trained_share(ledger)
        print({kind: round(seconds, 1) for kind, seconds in ledger.seconds.items()}, ledger.causes())
        print(f"measured: goodput {found:.1%} from the first step on, {ledger.goodput:.1%} with the start")
        assert len(faulty.events("fault")) >= MINUTES, faulty.job.story()
        assert found >= 0.70, faulty.job.story()
        assert abs(found - expected.goodput) <= 0.03, faulty.job.story()
