"""The rendered script: its text, and what bash makes of it where small stand-ins take the place of Slurm's programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.job import JobConfig
from launch.slurm import quote_directive, render
from pretrain.config import check_config

ROOT = Path(__file__).parents[2]
PROBE = str(Path(__file__).with_name("rank_probe.py"))
LIMIT_S = 30

HOSTILE = [
    "$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "'; touch PWNED; '", '"; touch PWNED; "', "\ntouch PWNED\n",
    "' $(touch PWNED) '", '" $(touch PWNED) "', "a\\", "\\$(touch PWNED)", "[0]=$(touch PWNED)", ") ; touch PWNED ; (",
    "${HOME}", "~", "*", "# not a comment", "-n", "--help", "", " ", "\t", "!!", "a=b c", "é 漢",
]  # fmt: skip

# Two ranks, each in a process group of its own, as a step has; like srun, it ends with the highest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=4 SLURM_STEP_NUM_TASKS=2
code=0
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank setsid "$@" >"$CALLS/rank-$rank" 2>&1 &
  echo $! >>"$CALLS/ranks"
done
for rank in $(<"$CALLS/ranks"); do wait "$rank" || { one=$?; ((one < code)) || code=$one; }; done
exit $code
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": '#!/bin/sh\n[ "$1" = requeue ] || { echo localhost; exit; }\necho "$@" >>"$CALLS/requeue"\n',
    "squeue": '#!/bin/sh\necho "$STATE"\n',
    "scancel": '#!/bin/sh\necho "$@" >>"$CALLS/scancel"\nfor rank in $(cat "$CALLS/ranks"); do kill -TERM "-$rank"; done\n',
}


class Stage:
    """A folder in which rendered scripts run as batch scripts do."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        self.calls.mkdir()
        (folder / "bin").mkdir()
        for name, text in STAND_INS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, state: str = "RUNNING None", restarts: int = 0, **keys) -> subprocess.Popen:
        values = {"name": "job", "nodes": 1, "gpus_per_node": 2, "time_limit_min": 60, "python": sys.executable, **keys}
        job = check_config(values, JobConfig, "job.yaml")
        (self.folder / "job.sbatch").write_text(render(job, job.command))
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "STATE": state,
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURMD_NODENAME": "localhost",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, **keys) -> tuple[int, str]:
        process = self.start(**keys)
        output, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, output

    def was_requeued(self) -> bool:
        return (self.calls / "requeue").exists()


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.parametrize(
    ("golden", "overrides"),
    [
        ("slurm.sbatch", []),
        (
            "slurm_command.sbatch",
            ["config=null", "overrides=[]", "command=[./probe, it's, $HOME]", "setup=[]", "environment={}",
             "requeue=false", "save_before_end_s=0", "memory_gib_per_node=null", "working_directory=/data/my runs",
             "partition='gpu,gpu-long'", "account=lab", "qos=high", "constraint='a100|h100'", "exclude='node[3-4]'",
             "reservation=week", "extra_sbatch={comment: 'say \"hi\" \\ there', mail-type: FAIL}"],
        ),
    ],
)  # fmt: skip
def test_golden(golden, overrides, capsys):
    """After a wanted change: python -m launch render configs/launch/slurm.yaml OVERRIDES > tests/golden/..."""
    assert main(["render", str(ROOT / "configs/launch/slurm.yaml"), *overrides]) == 0
    assert capsys.readouterr().out == (ROOT / "tests/golden" / golden).read_text()


def test_hostile_values_arrive_as_they_are(stage):
    code, output = stage.run(
        command=[sys.executable, PROBE, "say", "said.json", *HOSTILE],
        environment={f"HOSTILE_{i}": value for i, value in enumerate(HOSTILE)},
        output="logs $(touch PWNED) ' \" ; touch PWNED",
        working_directory="'; touch PWNED; \"$(touch PWNED)`touch PWNED`\\",
        account='a" --uid=0 \\',
    )
    assert code == 0, output
    said = json.loads((stage.folder / "said.json").read_text())
    assert said["words"] == HOSTILE
    assert [said["environment"][f"HOSTILE_{i}"] for i in range(len(HOSTILE))] == HOSTILE
    assert list(stage.folder.rglob("PWNED")) == []
    assert subprocess.run(["bash", "-n", stage.folder / "job.sbatch"]).returncode == 0


def test_hostile_values_stay_in_their_line_of_the_head(stage):
    lines = render(
        check_config(
            {"name": "job", "nodes": 1, "gpus_per_node": 2, "time_limit_min": 60, "command": ["true"],
             "working_directory": "; touch PWNED", "account": "a # b", "extra_sbatch": {"comment": '" --uid=0 "'}},
            JobConfig, "job.yaml",
        ),
        ["true"],
    ).splitlines()  # fmt: skip
    head = lines[: lines.index("set -euo pipefail")]
    assert '#SBATCH --chdir="; touch PWNED"' in head
    assert '#SBATCH --account="a # b"' in head
    assert '#SBATCH --comment="\\" --uid=0 \\""' in head
    assert all(line.startswith("#") for line in head)


@pytest.mark.parametrize(("value", "text"), [("gpu,b-1", "gpu,b-1"), ("a b", '"a b"'), ("\\'\"", '"\\\\\'\\""')])
def test_quoting_for_sbatch(value, text):
    assert quote_directive(value) == text


@pytest.mark.parametrize(
    ("exits", "state", "keys", "code", "requeued", "says"),
    [
        ("0", "RUNNING None", {}, 0, False, "finished"),
        ("7", "RUNNING None", {}, 7, False, "ended first, with exit code 7"),
        ("85", "RUNNING None", {}, 85, True, "queued again"),
        ("85", "COMPLETING TimeLimit", {}, 85, True, "queued again"),
        ("85", "COMPLETING None", {}, 85, False, "Slurm is ending the job"),  # scancel: it must stay cancelled
        ("85", "RUNNING None", {"max_requeues": 3, "restarts": 2}, 85, True, "queued again"),
        ("85", "RUNNING None", {"max_requeues": 3, "restarts": 3}, 85, False, "not queued again after 3 restarts"),
        ("85", "RUNNING None", {"requeue": False}, 85, False, "Submit it again"),
    ],
)
def test_how_a_job_ends(stage, exits, state, keys, code, requeued, says):
    ended, output = stage.run(command=["sh", "-c", f"exit {exits}"], state=state, **keys)
    assert (ended, stage.was_requeued()) == (code, requeued), output
    assert says in output


@pytest.mark.parametrize(
    ("first", "then", "code", "requeued"),
    [
        ("exit 7", "kill -KILL $$", 7, False),  # srun would tell the highest code: that of a rank killed after it
        ("exit 7", "exit 85", 7, False),
        ("exit 85", "exit 1", 85, True),
        ("exit 85", "kill -KILL $PPID", 85, True),  # as srun does with ranks that stay behind for too long
    ],
)
def test_the_first_rank_that_does_not_finish_says_how_the_job_ended(stage, first, then, code, requeued):
    ranks = f"[ $RANK = 1 ] && {first}; until [ -s logs/job-12/start-0.first ]; do sleep 0.05; done; {then}"
    ended, output = stage.run(command=["sh", "-c", ranks], output="logs")
    assert (ended, stage.was_requeued()) == (code, requeued), output
    assert f"rank 1 on localhost ended first, with exit code {code}" in output


def test_usr1_reaches_the_ranks_as_sigterm_and_the_script_waits_for_them(stage):
    process = stage.start(command=[sys.executable, PROBE, "train"])
    wait_for(lambda: all("ready" in read(stage.calls / f"rank-{rank}") for rank in (0, 1)))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 85, output
    assert read(stage.calls / "scancel") == "--signal=TERM 12.4\n"
    assert all("saved" in read(stage.calls / f"rank-{rank}") for rank in (0, 1))
    assert stage.was_requeued()


def test_a_rank_that_slurms_sigterm_ends_before_it_can_listen_was_interrupted(stage):
    process = stage.start(command=["sh", "-c", "echo ready; exec sleep 60"])
    wait_for(lambda: all("ready" in read(stage.calls / f"rank-{rank}") for rank in (0, 1)))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, stage.was_requeued()) == (85, True), output


def test_a_rank_that_anyone_else_ends_has_failed(stage):
    code, output = stage.run(command=["sh", "-c", "kill -TERM $$"])
    assert (code, stage.was_requeued()) == (143, False), output


def test_setup_may_read_unset_variables_but_must_succeed(stage):
    code, output = stage.run(command=["sh", "-c", "test $FROM_SETUP = yes"], setup=['export FROM_SETUP="yes$UNSET"'])
    assert code == 0, output
    code, output = stage.run(command=["true"], setup=["false"])
    assert code == 1, output


@pytest.mark.parametrize(
    ("sbatch", "message"),
    [
        (None, "sbatch is not on PATH"),
        (
            "echo 'sbatch: error: invalid partition specified: x' >&2; echo 'sbatch: error: Batch job submission failed' >&2; exit 1",
            "error: sbatch refused the job: invalid partition specified: x; Batch job submission failed\n",
        ),
    ],
)
def test_a_refused_submission_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, sbatch, message):
    if sbatch:
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
        (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    job = {"name": "job", "command": ["true"], "nodes": 1, "gpus_per_node": 1, "time_limit_min": 60}
    (tmp_path / "job.yaml").write_text(json.dumps({**job, "output": str(tmp_path / "logs")}))
    assert main(["submit", str(tmp_path / "job.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.glob("logs/*")) == []


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
