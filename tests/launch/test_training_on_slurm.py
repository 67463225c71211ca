"""The real trainer, submitted to this machine and to a real Slurm with time limits: both runs are the same."""

import json
import re
import subprocess
import sys

import pytest
from cluster import ROOT, Cluster
from lives import losses_of
from paths import TINY

from launch.events import read_launch_events

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
LIMIT_S = 1200
STEPS = 300


@pytest.mark.parametrize("chain", [1, 6])
def test_training_goes_on_over_time_limits(tmp_path, shards, chain):
    """The job is queued again, or the next one of its chain follows."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    keys = {"config": str(TINY), "overrides": [f"data.path={shards / 'train'}", f"train.duration={STEPS} steps"]}
    keys |= {"environment": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}, "python": sys.executable}
    keys |= {"working_directory": str(tmp_path)}
    local = {**keys, "name": "local", "kind": "local", "run": str(undisturbed), "nodes": 1, "gpus_per_node": 4}
    (tmp_path / "local.yaml").write_text(json.dumps(local))
    command = [sys.executable, "-m", "launch", "submit", str(tmp_path / "local.yaml"), "--wait"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    with Cluster.up(tmp_path, 2, "--gpus", "2") as cluster:
        job = cluster.submit(
            tmp_path, **keys, command=None, run=str(run), time_limit_min=3, save_before_end_s=70, chain=chain,
            requeue=chain == 1, preflight={"enabled": True}, memory_gib_per_node=None,
        )  # fmt: skip
        cluster.wait_for((run / "done.json").exists, job, LIMIT_S)
        cluster.wait_for(lambda: cluster.run("squeue", "-h") == "", job)
        status = cluster.run(sys.executable, "-m", "launch", "status", run)
    assert "state      done" in status and f"step {STEPS} of {STEPS} (100.0%)" in status, status
    ends = [(event["code"], event["next"]) for event in read_launch_events(run) if event["event"] == "job_end"]
    assert len(ends) >= 2 and {code for code, _ in ends[:-1]} == {85} and ends[-1] == (0, None), ends
    assert losses_of(run) == losses_of(undisturbed)
    said = (run / "launch/logs/rank-00000.log").read_text()
    assert "lost or doubled" not in said
    assert len(set(re.findall(r"epoch (\d+) of .* samples, each once", said))) == STEPS * 8 // 48, said
