"""What else a job on a real Slurm goes through: each repair in order, a controller that is killed, slurmd restarted, and ten
minutes of a slow network and busy processors in which nobody may be accused. `make test-faults`."""

import subprocess
import sys
import time

import pytest
from cluster import Cluster
from test_fault_matrix import break_node, submit

pytestmark = [pytest.mark.slurm, pytest.mark.faults]


def test_each_repair_in_order(tmp_path):
    """Restart, spare, fewer nodes, more again, and back into the queue without the bad nodes."""
    with Cluster.up(tmp_path, 7, "--node-timeout", "10") as cluster:
        others = "NodeName=node[5-7]"
        cluster.run("scontrol", "update", others, "State=DRAIN", "Reason=later")
        recorded, _ = submit(cluster, tmp_path / "job", nodes=3, min_nodes=2, steps=400)
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        cluster.run("scontrol", "update", others, "State=RESUME")

        def break_and_wait(fault: str, node: str, action: str, nodes: list[str]) -> None:
            lives = len(recorded.events("training"))
            if fault == "thaw":
                cluster.lab("thaw", node)
            else:
                break_node(cluster, recorded, fault, node)
            recorded.wait_for_event("repair", action=action, nodes=nodes)
            if nodes:
                recorded.wait_for_event("training", count=lives + 1)

        break_and_wait("kill", "node2", "restart", ["node1", "node2", "node3"])
        break_and_wait("freeze", "node2", "swap", ["node1", "node4", "node3"])
        break_and_wait("freeze", "node3", "shrink", ["node1", "node4"])
        break_and_wait("thaw", "node3", "grow", ["node1", "node4", "node3"])
        assert [event["action"] for event in recorded.events("repair")] == ["restart", "swap", "shrink", "grow"]
        cluster.lab("freeze", "node4")
        recorded.wait_for_event("repair", action="shrink", nodes=["node1", "node3"])
        cluster.lab("freeze", "node3")
        repair = recorded.wait_for_event("repair", action="requeue")
        assert repair["excluded"] == ["node2", "node3", "node4"]
        recorded.wait_for(lambda: len(recorded.events("job_end")) == 2, "the end of the run", 240)
        recorded.check_exact(400)
        assert recorded.events("job_start")[-1]["nodes"] == ["node1", "node5", "node6", "node7"]
        assert [event["code"] for event in recorded.events("job_end")] == [86, 0]


def test_a_controller_that_is_killed_and_comes_back(tmp_path):
    with Cluster.up(tmp_path, 3) as cluster:
        recorded, job = submit(cluster, tmp_path / "job", steps=120)
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        time.sleep(6)  # it forgets what happened in its last 5 s
        cluster.lab("daemon", "ctl", "kill")
        at = break_node(cluster, recorded, "kill", "node2")
        training = recorded.wait_for_event("training", count=2)
        assert training["time"] - at < 15
        cluster.lab("daemon", "ctl", "start")
        job.wait_for_end("COMPLETED")
        recorded.check_exact(120)
        assert len(recorded.events("fault")) == 1


def test_slurmd_restarted(tmp_path):
    with Cluster.up(tmp_path, 3) as cluster:
        recorded, job = submit(cluster, tmp_path / "job", steps=200)
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        for node in ("node2", "node1"):
            cluster.lab("daemon", node, "stop")
            time.sleep(3)
            cluster.lab("daemon", node, "start")
        job.wait_for_end("COMPLETED")
        recorded.check_exact(200)
        assert not recorded.events("fault")


@pytest.mark.parametrize("nodes", [2, 3])
def test_an_outage_of_the_whole_network(tmp_path, nodes):
    """Nobody hears anybody for 12 s: then the job goes on with all of its nodes, and without another wait in the queue."""
    with Cluster.up(tmp_path, nodes + 1, "--node-timeout", "300") as cluster:
        recorded, job = submit(cluster, tmp_path / "job", nodes=nodes, spare_nodes=0, steps=200)
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        everyone = [f"node{number}" for number in range(1, nodes + 1)]
        for node in everyone:
            cluster.lab("cut", node)
        time.sleep(12)
        for node in everyone:
            cluster.lab("heal", node)
        recorded.wait_for_event("repair", action="restart", nodes=everyone)
        job.wait_for_end("COMPLETED")
        recorded.check_exact(200)
        assert len(recorded.events("job_start")) == 1
        assert len(recorded.events("life_start")) == 2


def test_no_false_alarm_in_ten_minutes_of_a_slow_network_and_busy_processors(tmp_path):
    with Cluster.up(tmp_path, 3) as cluster:
        recorded, job = submit(cluster, tmp_path / "job", steps=6000, time_limit_min=30)
        recorded.wait_for(lambda: recorded.step() >= 8, "step 8")
        for node in ("node1", "node2", "node3"):
            cluster.lab("slow", node, "500kbit")
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            end = time.monotonic() + 600
            while time.monotonic() < end:
                assert not recorded.events("fault"), recorded.story()
                time.sleep(1)
        finally:
            for process in busy:
                process.kill()
        assert [event["event"] for event in recorded.events()][-1] == "training"
        assert recorded.step() > 1000
