"""The real trainer through `launch submit` on a real Slurm, over time limits: the run is the one that nothing interrupted."""

import re
import sys

import pytest
from cluster import Cluster
from lives import LifeOfRun, arguments, losses_of
from paths import TINY

from launch.events import read_launch_events

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
LIMIT_S = 1200


@pytest.mark.parametrize("chain", [1, 6])
def test_training_goes_on_over_time_limits(tmp_path, shards, chain):
    """The job is queued again, or the next one of its chain follows."""
    steps = "train.duration=300 steps"
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert set(LifeOfRun(undisturbed, arguments(shards, undisturbed, steps), 4).wait()) == {0}
    with Cluster.up(tmp_path, 2, "--gpus", "2") as cluster:
        job = cluster.submit(
            tmp_path, command=None, config=str(TINY), overrides=[f"data.path={shards / 'train'}", steps], run=str(run),
            time_limit_min=3, save_before_end_s=70, environment={"DS_ACCELERATOR": "cpu"}, chain=chain,
            requeue=chain == 1, preflight={"enabled": True}, memory_gib_per_node=None,
        )  # fmt: skip
        cluster.wait_for((run / "done.json").exists, job, LIMIT_S)
        cluster.wait_for(lambda: cluster.run("squeue", "-h") == "", job)
        status = cluster.run(sys.executable, "-m", "launch", "status", run)
    assert "state      done" in status and "step 300 of 300 (100.0%)" in status, status
    ends = [(event["code"], event["next"]) for event in read_launch_events(run) if event["event"] == "job_end"]
    assert len(ends) >= 2 and {code for code, _ in ends[:-1]} == {85} and ends[-1] == (0, None), ends
    assert losses_of(run) == losses_of(undisturbed)
    said = (run / "launch/logs/rank-00000.log").read_text()
    assert "lost or doubled" not in said
    assert len(set(re.findall(r"epoch (\d+) of .* samples, each once", said))) == 300 * 8 // 48, said
