"""The rendered scripts: their text for several clusters, and what bash makes of them where small stand-ins take the place of
Slurm's programs and of the supervisors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.job import JobConfig, resolve_job
from launch.slurm import quote_directive, render
from pretrain.config import check_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/launch/golden"
LIMIT_S = 30

HOSTILE = [
    "$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "'; touch PWNED; '", '"; touch PWNED; "', "\ntouch PWNED\n",
    "' $(touch PWNED) '", '" $(touch PWNED) "', "a\\", "\\$(touch PWNED)", "[0]=$(touch PWNED)", ") ; touch PWNED ; (",
    "${HOME}", "~", "*", "# not a comment", "-n", "--help", "", " ", "\t", "!!", "a=b c", "é 漢", "; rm -rf PRECIOUS",
]  # fmt: skip

# Clusters: what is given beside configs/launch/slurm.yaml.
CLUSTERS = {
    "plain.sbatch": [],
    "modules.sbatch": ["cluster=configs/launch/cluster_modules.yaml", "setup=[]", "gpus_per_node=null", "spare_nodes=1"],
    "conda.sbatch": ["cluster=configs/launch/cluster_conda.yaml", "setup=[]", "gpus_per_node=null", "mail=me@example.org"],
    "pyxis.sbatch": ["cluster=configs/launch/cluster_pyxis.yaml", "setup=[]", "qos=high", "reservation=week"],
    "apptainer.sbatch": ["cluster=configs/launch/cluster_apptainer.yaml", "setup=[]", "environment={}"],
    "command.sbatch": [
        "config=null", "overrides=[]", "command=[./probe, it's, $HOME]", "setup=[]", "environment={}", "run=runs/a b",
        "requeue=false", "chain=3", "save_before_end_s=0", "memory_gib_per_node=null", "working_directory=/data/my runs",
        "partition='gpu,gpu-long'", "account=lab", "constraint='a100|h100'", "exclude='node[3-4]'",
        "extra_sbatch={comment: 'say \"hi\" \\ there', nice: 100}",
    ],
    "ssh.sh": ["kind=ssh", "nodes=2", "hosts=[node1, me@node2]"],
}  # fmt: skip

# One task: the supervisors' stand-in, `agent`, which is `python` of the jobs here.
SRUN = """#!/usr/bin/env bash
echo "$@" >"$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
STAND_INS = {"srun": SRUN, "scontrol": '#!/bin/sh\necho "$@" >>"$CALLS/scontrol"\n'}


class Stage:
    """A folder in which rendered scripts run as batch scripts do. `agent`: a line of bash, what the supervisors do."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        self.calls.mkdir()
        (folder / "bin").mkdir()
        for name, text in STAND_INS.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def start(
        self, agent: str, restarts: int = 0, submission: str = "", job_id: int = 12, patience: str = "20", **keys
    ):
        agent = agent.replace("$here/", f'"$LAUNCH/jobs/12-{restarts}"/')
        self.write("agent", f"#!/usr/bin/env bash\n{agent}\n")
        values = {
            "name": "job",
            "nodes": 1,
            "gpus_per_node": 2,
            "time_limit_min": 60,
            "python": str(self.folder / "bin/agent"),
        }
        values |= {"command": ["true"], "run": "run", "working_directory": str(self.folder), **keys}
        job = resolve_job(check_config(values, JobConfig, "job.yaml"))
        self.launch = job.launch
        self.launch.mkdir(parents=True, exist_ok=True)
        (self.launch / "job.json").touch()
        script = render(job)
        assert "waited > 20)" in script  # half seconds
        (self.folder / "job.sbatch").write_text(script.replace("waited > 20)", f"waited > {patience})"))
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "LAUNCH": str(self.launch),
            "SLURM_JOB_ID": str(job_id),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURMD_NODENAME": "localhost",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", "job.sbatch", *([submission] if submission else [])],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, agent: str, **keys) -> tuple[int, str]:
        process = self.start(agent, **keys)
        output, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, output

    def said(self, name: str) -> str:
        return read(self.calls / name)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.parametrize("golden", CLUSTERS)
def test_golden(golden, capsys, monkeypatch):
    """After a wanted change: tests/launch/test_rendered_script.py GOLDEN writes them all anew."""
    assert render_golden(golden, capsys) == (GOLDEN / golden).read_text()


def render_golden(golden: str, capsys=None) -> str:
    given = ["working_directory=/home/me/stack", "run=runs/vit_b16", *CLUSTERS[golden]]
    assert main(["render", str(ROOT / "configs/launch/slurm.yaml"), *given]) == 0
    return capsys.readouterr().out if capsys else ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("golden", CLUSTERS)
def test_shellcheck_finds_nothing(golden):
    # 1091: it does not follow `source`; 2016: that $HOME is not expanded is the point
    command = ["shellcheck", "-s", "bash", "-e", "1091,2016", GOLDEN / golden]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", GOLDEN / golden]).returncode == 0


def test_hostile_values_arrive_as_they_are(stage):
    (stage.folder / "PRECIOUS").touch()
    say = f'{sys.executable} -c \'import json, os; json.dump(dict(os.environ), open("said.json", "w"))\'; echo 0 >$here/end'
    run = "run $(touch PWNED) ' \" ; rm -rf PRECIOUS"
    code, output = stage.run(
        say,
        environment={f"HOSTILE_{i}": value for i, value in enumerate(HOSTILE)},
        run=run,
        account='a" --uid=0 \\',
    )
    assert code == 0, output
    said = json.loads((stage.folder / "said.json").read_text())
    assert [said[f"HOSTILE_{i}"] for i in range(len(HOSTILE))] == HOSTILE
    assert stage.said("srun").endswith(f"-m launch agent {stage.folder}/{run}/launch/job.json\n")
    assert list(stage.folder.rglob("PWNED")) == [] and (stage.folder / "PRECIOUS").exists()


def test_hostile_values_stay_in_their_line_of_the_head():
    values = {"name": "job", "nodes": 1, "gpus_per_node": 2, "time_limit_min": 60, "command": ["true"],
              "working_directory": "/; touch PWNED", "account": "a # b", "extra_sbatch": {"comment": '" --uid=0 "'}}  # fmt: skip
    lines = render(resolve_job(check_config(values, JobConfig, "job.yaml"))).splitlines()
    head = lines[: lines.index("set -euo pipefail")]
    assert '#SBATCH --chdir="/; touch PWNED"' in head
    assert '#SBATCH --account="a # b"' in head
    assert '#SBATCH --comment="\\" --uid=0 \\""' in head
    assert all(line.startswith("#") for line in head)


@pytest.mark.parametrize(("value", "text"), [("gpu,b-1", "gpu,b-1"), ("a b", '"a b"'), ("\\'\"", '"\\\\\'\\""')])
def test_quoting_for_sbatch(value, text):
    assert quote_directive(value) == text


@pytest.mark.parametrize(
    ("agent", "code", "stopped", "says"),
    [
        ("echo 0 >$here/end", 0, "", "ends with exit code 0"),
        ("echo 7 >$here/end", 7, "7 12 job 12 ended with exit code 7", "ends with exit code 7"),
        ("echo 85 >$here/end; echo requeue >$here/continued; exit 85", 85, "", "ends with exit code 85"),
        ("exit 7", 7, "7 12 job 12 ended with exit code 7", "without a word"),
        ("exit 0", 1, "1 12 job 12 ended with exit code 1", "without a word"),  # success has to be said
        ("echo 0 >$here/end; exit 3", 0, "", "ends with exit code 0"),  # who could not end well changes nothing
    ],
)
def test_the_exit_code_is_what_the_supervisors_say(stage, agent, code, stopped, says):
    ended, output = stage.run(agent)
    assert ended == code, output
    assert says in output
    assert read(stage.launch / "stopped").strip() == stopped


def test_the_script_does_not_wait_for_the_dead(stage):
    """srun waits for tasks on nodes that are gone."""
    process = stage.start("echo 85 >$here/end; until [ -e $here/over ]; do sleep 0.1; done", patience="2")
    assert process.wait(LIMIT_S) == 85
    assert subprocess.run(["pgrep", "-f", str(stage.folder / "bin/agent")], capture_output=True).returncode == 0
    (stage.launch / "jobs/12-0/over").touch()
    process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize(("number", "notice"), [(signal.SIGUSR1, "time_limit"), (signal.SIGTERM, "cancel")])
def test_signals_reach_the_supervisors_and_the_script_waits_for_them(stage, number, notice):
    agent = "echo ready >$CALLS/ready; until [ -s $here/notice ]; do sleep 0.1; done; echo 85 >$here/end"
    process = stage.start(agent)
    wait_for(lambda: stage.said("ready"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 85, output
    assert read(stage.launch / "jobs/12-0/notice") == f"{notice}\n"


def test_the_script_queues_the_job_again_where_the_supervisors_cannot(stage):
    code, output = stage.run("touch $here/requeue; echo 85 >$here/end")
    assert (code, stage.said("scontrol")) == (85, "requeue 12\n"), output
    assert not (stage.launch / "stopped").exists()


def test_of_a_submission_that_was_taken_twice_only_one_runs(stage):
    assert stage.run("echo 0 >$here/end", submission="token")[0] == 0
    assert stage.run("echo 0 >$here/end", submission="token", restarts=1)[0] == 0, "the same job, queued again"
    (stage.calls / "srun").unlink()
    code, output = stage.run("echo 0 >$here/end", submission="token", job_id=13)
    assert (code, stage.said("srun")) == (0, "")
    assert "this submission runs as job 12 already" in output


def test_a_job_of_a_chain_does_nothing_when_the_run_is_done_or_stopped(stage):
    assert stage.run("exit 9")[0] == 9
    code, output = stage.run("echo 0 >$here/end", job_id=13)
    assert code == 9 and "the run was stopped: job 12 ended with exit code 9" in output
    assert stage.run("echo 0 >$here/end", restarts=1)[0] == 0, "somebody has queued job 12 again"
    (stage.folder / "run/done.json").touch()
    os.utime(stage.folder / "run/done.json", (2**32, 2**32))  # later than the submission
    (stage.calls / "srun").unlink()
    code, output = stage.run("exit 9", job_id=14)
    assert (code, stage.said("srun")) == (0, "") and "the run is done" in output


def test_setup_may_read_unset_variables_but_must_succeed(stage):
    code, output = stage.run("test $FROM_SETUP = yes && echo 0 >$here/end", setup=['export FROM_SETUP="yes$UNSET"'])
    assert code == 0, output
    code, output = stage.run("echo 0 >$here/end", setup=["false"], run="other")
    assert code == 1, output


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


if __name__ == "__main__":
    for name in CLUSTERS:
        with open(GOLDEN / name, "w") as file:
            sys.stdout = file
            render_golden(name)
