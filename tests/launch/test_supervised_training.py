"""The real trainer under supervisors: a rank is killed, and the run is the one that nothing disturbed."""

import os
import signal
import sys
from pathlib import Path

import pytest
from lives import LifeOfRun, arguments, losses_of
from paths import TINY
from supervised import LocalRun

DURATION = "train.duration=10 steps"
PATIENCE_S = 300  # four processes that import torch, twice, on a machine that may have other work


class Training(LocalRun):
    def __init__(self, folder: Path, shards: Path, ranks_per_node: int) -> None:
        overrides = [f"run={folder / 'run'}", f"data.path={shards / 'train'}", DURATION]
        values = {"config": str(TINY), "overrides": overrides, "python": sys.executable}
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        super().__init__(folder, 2, steps=0, gpus_per_node=ranks_per_node, environment=environment, **values)


@pytest.mark.parametrize("ranks_per_node", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_training_goes_on_as_if_nothing_had_happened(tmp_path, shards, ranks_per_node):
    undisturbed = tmp_path / "undisturbed"
    assert set(LifeOfRun(undisturbed, arguments(shards, undisturbed, DURATION), 2 * ranks_per_node).wait()) == {0}
    with Training(tmp_path / "killed", shards, ranks_per_node).start() as job:
        job.wait_for(lambda: len(job.metrics()) >= 4, "step 4", PATIENCE_S)
        os.kill(job.ranks_of("b")[-1], signal.SIGKILL)
        assert job.ends(patience_s=PATIENCE_S) == [0, 0]
    assert [event["action"] for event in job.events("repair")] == ["restart"]
    assert losses_of(job.run) == losses_of(undisturbed)
    assert sorted(losses_of(undisturbed)) == list(range(1, 11))
