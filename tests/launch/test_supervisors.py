"""Supervisors on this machine: faults are noticed in time, named, and repaired; the run is the one that nothing disturbed."""

import os
import signal
import time

import pytest
from supervised import LocalRun


def test_a_job_without_faults(tmp_path):
    with LocalRun(tmp_path, nodes=2, steps=10, preflight={"enabled": True}).start() as job:
        assert job.ends() == [0, 0]
        job.check_exact(10)
        names = [event["event"] for event in job.events()]
        assert names == ["job_start", "preflight", "life_start", "training", "life_end", "verdict", "job_end"]
        assert job.events("preflight")[0]["bad"] == {}
        assert job.events("job_end")[0]["code"] == 0
        assert job.events("life_start")[0]["ranks"] == {"a": [0, 1], "b": [2, 3]}


def test_a_killed_rank_is_noticed_within_a_second_and_the_run_goes_on(tmp_path):
    with LocalRun(tmp_path, nodes=2, steps=40).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        at = time.time()
        os.kill(job.ranks_of("b")[0], signal.SIGKILL)
        fault = job.wait_for_event("fault")
        assert (fault["kind"], fault["node"], fault["detail"]) == ("exit", "b", "signal 9")
        assert fault["time"] - at < 1
        training = job.wait_for_event("training", count=2)
        assert training["time"] - fault["time"] < 15
        assert job.events("repair")[0]["action"] == "restart"
        assert job.ends() == [0, 0]
        job.check_exact(40)


def test_a_frozen_node_is_named_and_a_spare_takes_its_place(tmp_path):
    with LocalRun(tmp_path, nodes=2, spare_nodes=1, steps=60).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        at = time.time()
        job.signal_node("b", signal.SIGSTOP)
        fault = job.wait_for_event("fault")
        assert (fault["kind"], fault["node"]) == ("frozen", "b")
        assert fault["time"] - at < 5
        repair = job.wait_for_event("repair")
        assert (repair["action"], repair["nodes"], repair["spare"]) == ("swap", ["a", "c"], "c")
        job.wait_for_event("training", count=2)
        job.signal_node("b", signal.SIGCONT)  # what was frozen comes back, and must not disturb
        assert job.ends() == [0, 0, 0]
        job.check_exact(60)


def test_the_first_node_dies(tmp_path):
    with LocalRun(tmp_path, nodes=2, spare_nodes=1, steps=40).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        at = time.time()
        job.signal_node("a", signal.SIGKILL)
        fault = job.wait_for_event("fault", node="a")
        assert fault["time"] - at < 2
        assert job.ends("b", "c") == [0, 0]
        assert job.events("repair")[0]["nodes"] == ["c", "b"]
        job.check_exact(40)


def test_fewer_nodes_and_more_again(tmp_path):
    with LocalRun(tmp_path, nodes=3, min_nodes=2, steps=150).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        job.signal_node("c", signal.SIGSTOP)
        repair = job.wait_for_event("repair")
        assert (repair["action"], repair["nodes"]) == ("shrink", ["a", "b"])
        job.wait_for_event("training", count=2)
        job.signal_node("c", signal.SIGCONT)
        job.wait_for_event("repair", action="grow", nodes=["a", "b", "c"])
        assert job.ends() == [0, 0, 0]
        assert [event["world_size"] for event in job.events("life_start")] == [6, 4, 6]
        job.check_exact(150)


def test_a_frozen_rank_is_named(tmp_path):
    with LocalRun(tmp_path, nodes=1, steps=40).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        at = time.time()
        os.kill(job.ranks_of("a")[1], signal.SIGSTOP)
        fault = job.wait_for_event("fault")
        assert (fault["kind"], fault["node"], fault["rank"]) == ("frozen", "a", 1)
        assert fault["time"] - at < 5
        assert job.ends() == [0]
        assert job.events("verdict")[0]["cause"] == "node"
        job.check_exact(40)


@pytest.mark.faults
def test_a_rank_without_a_sign_of_life_is_named(tmp_path):
    with LocalRun(tmp_path, nodes=1, steps=400, rank_silent_s=12).start() as job:
        job.wait_for(lambda: job.step() >= 60, "step 60")  # its sign of life has been read
        (job.run / "mute").touch()
        fault = job.wait_for_event("fault")
        (job.run / "mute").unlink()
        assert (fault["kind"], fault["node"], fault["rank"]) == ("silent", "a", 1)
        assert job.ends(patience_s=120) == [0]
        job.check_exact(400)


def test_fewer_gpus_than_ranks_fail_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with LocalRun(tmp_path, nodes=2, steps=10).start() as job:
        assert job.ends() == [2, 2]
        assert "a: 2 ranks need a GPU each, 1 GPU visible" in job.events("job_end")[0]["reason"]
        assert not job.events("life_start")


def test_a_deterministic_crash_costs_two_lives(tmp_path):
    with LocalRun(tmp_path, nodes=2, steps=40).start("a") as job:
        (job.run / "crash_at").write_text("7")
        job.start("b")
        assert job.ends() == [1, 1]
        assert len(job.events("life_start")) == 2
        last = job.events("verdict")[-1]
        assert (last["stop"], last["cause"]) == (True, "code")
        assert "ValueError: step 7" in last["excerpt"]


def test_a_job_asked_to_stop_saves(tmp_path):
    with LocalRun(tmp_path, nodes=2, steps=400).start() as job:
        job.wait_for(lambda: job.step() >= 8, "step 8")
        job.supervisors["b"].send_signal(signal.SIGTERM)
        assert job.ends() == [85, 85]
        assert job.events("notice")[0]["kind"] == "cancel"
        assert not job.events("fault")
        saved = job.events("life_end")[0]["step"]
        assert saved == len(job.metrics()) == job.events("verdict")[0]["saved_step"]
        job.check_exact(saved)
