"""Arrays of tasks: the job file, the two scripts, what bash makes of them, and how they are submitted."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_rendered_script import HOSTILE

from data_tools.errors import UserError
from launch import slurm_array
from launch.__main__ import main
from launch.job import ArrayConfig, build_command, load_job
from pretrain.config import check_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs/launch/build.yaml"
PROBE = str(Path(__file__).with_name("rank_probe.py"))
GOLDEN = ROOT / "tests/launch/golden/slurm_array.sbatch"
LEAST = {"kind": "slurm_array", "name": "job", "command": ["true"], "tasks": 3, "time_limit_min": 60}
CHANGED = [
    "command=[./probe, it's, $HOME, 'part {task} of {tasks}', 'x{00..03}.tar']", "then=null", "setup=[]",
    "tasks=100", "max_running=7", "memory_gib=16", "requeue=false", "working_directory=/data/my runs", "partition=cpu",
    "account=lab", "qos=high", "constraint='intel|amd'", "exclude='node[3-4]'", "reservation=week",
    "environment={A: \"it's\"}", "extra_sbatch={comment: 'say \"hi\" \\ there', mail-type: FAIL, exclusive: true}",
]  # fmt: skip


def make_job(**keys) -> ArrayConfig:
    return check_config({**LEAST, **keys}, ArrayConfig, "job.yaml")


@pytest.mark.parametrize(("golden", "overrides"), [("slurm_array", []), ("slurm_array_command", CHANGED)])
def test_golden(golden, overrides, capsys):
    """After a wanted change: python -m launch render configs/launch/build.yaml OVERRIDES > tests/launch/golden/..."""
    assert main(["render", str(EXAMPLE), *overrides]) == 0
    assert capsys.readouterr().out == GOLDEN.with_stem(golden).read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=lokal", "kind: unknown kind 'lokal'. Valid: slurm, local, ssh, slurm_array"),
        ("kind=[1]", "kind: unknown kind [1]. Valid: slurm, local, ssh, slurm_array"),
        ("task=2", "task: unknown key. Did you mean 'tasks'? Valid: kind, name,"),
        ("nodes=2", "nodes: unknown key."),
        ("tasks=0", "tasks: should be greater than or equal to 1; found 0"),
        ("max_running=0", "max_running: should be greater than or equal to 1; found 0"),
        ("command=[]", "command: "),
        ("then=[]", "then: "),
        ("then=['finish {task}']", "then: runs once, after all tasks, so there is no {task} for it"),
        ('command=["a\\0b"]', "command.0: no program can be given a NUL"),
        ("name=a b", "name: names the job's files"),
        ("environment={SLURM_ARRAY_TASK_ID: 1}", "environment: SLURM_ARRAY_TASK_ID is set by Slurm"),
        ("extra_sbatch={array: 1-3}", "extra_sbatch: --array is written from tasks and max_running; set that"),
        ("extra_sbatch={mem: 1G}", "extra_sbatch: --mem is written from memory_gib; set that"),
        ("extra_sbatch={nodes: 2}", "extra_sbatch: --nodes breaks the script"),
        ('account="a\\n#SBATCH --uid=0"', "account: goes into one #SBATCH line"),
        ("output=logs/%j", "output: is a folder; Slurm gives '%'"),
    ],
)
def test_a_wrong_job_file_is_refused_in_one_line(override, message, capsys):
    assert main(["render", str(EXAMPLE), override]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_the_task_stands_where_it_is_asked_for_or_last():
    assert build_command(make_job(command=["a", "b"])) == ["a", "b", "--task", "{task}/3"]
    assert build_command(make_job(command=["a", "{task}-{tasks}", "{tasks}"])) == ["a", "{task}-3", "3"]


def test_the_example_shows_every_key_with_its_default():
    text = EXAMPLE.read_text()
    shown, least = load_job(EXAMPLE, []).model_dump(), make_job().model_dump()
    for key, field in ArrayConfig.model_fields.items():
        assert re.search(rf"^{key}: ", text, re.MULTILINE) or f"\n{key}:  #" in text, key
        if not field.is_required() and field.default not in (None, [], {}):
            assert shown[key] == least[key], key


def test_the_page_explains_every_key():
    page = (ROOT / "docs/launch.md").read_text()
    array = page[page.index("## Arrays") :]
    own = set(ArrayConfig.model_fields) - set(load_job(ROOT / "configs/launch/slurm.yaml", []).model_dump())
    assert own == {"then", "tasks", "max_running", "cpus_per_task", "memory_gib", "output"}
    assert [key for key in {*own, "command"} if f"| `{key}` |" not in array] == []
    assert [key for key in ArrayConfig.model_fields if f"| `{key}` |" not in page] == []


def run_script(script: str, folder: Path, task: int = 2) -> subprocess.CompletedProcess:
    (folder / "job.sbatch").write_text(script)
    assert subprocess.run(["bash", "-n", "job.sbatch"], cwd=folder).returncode == 0
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "RANK": "0"}
    return subprocess.run(
        ["bash", "job.sbatch"], cwd=folder, env=environment, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("part", ["array", "then"])
def test_hostile_values_arrive_as_they_are(part, tmp_path):
    words = [sys.executable, PROBE, "say", "said.json", *HOSTILE]
    job = make_job(
        command=[*words, "{task}", "'{task}$(touch PWNED)\"{tasks}"],
        then=words,
        environment={f"HOSTILE_{i}": value for i, value in enumerate(HOSTILE)},
        output="logs $(touch PWNED) ' \" ; touch PWNED",
        working_directory="'; touch PWNED; \"$(touch PWNED)`touch PWNED`\\",
        account='a" --uid=0 \\',
        extra_sbatch={"comment": '" --uid=0 "; touch PWNED'},
    )
    scripts = {"array": slurm_array.render_array(job, build_command(job)), "then": slurm_array.render_then(job)}
    done = run_script(scripts[part], tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["words"] == HOSTILE + (["2", "'2$(touch PWNED)\"3"] if part == "array" else [])
    assert [said["environment"][f"HOSTILE_{i}"] for i in range(len(HOSTILE))] == HOSTILE
    assert list(tmp_path.rglob("PWNED")) == []
    head = scripts[part].splitlines()[: scripts[part].splitlines().index("set -euo pipefail")]
    assert all(line.startswith("#") for line in head)


def test_the_exit_code_is_the_commands_and_setup_must_succeed(tmp_path):
    code = ["sh", "-c", 'test "$A" = yes && exit $0', "{task}"]
    job = make_job(command=code, setup=['export A="yes$UNSET"', "task=9"])
    assert run_script(slurm_array.render(job), tmp_path, 5).returncode == 5
    job = make_job(command=["touch", "ran-{task}"], setup=["false"])
    assert run_script(slurm_array.render(job), tmp_path).returncode == 1
    assert list(tmp_path.glob("ran*")) == []


def test_who_runs_both_texts_as_one_script_runs_the_first_only(tmp_path):
    job = make_job(command=["touch", "ran-{task}"], then=["touch", "ran-then"])
    assert run_script(slurm_array.render(job), tmp_path).returncode == 0
    assert [path.name for path in tmp_path.glob("ran*")] == ["ran-2"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("golden", ["slurm_array", "slurm_array_command"])
def test_shellcheck_finds_nothing(golden, tmp_path):
    for number, script in enumerate(re.split(r"^(?=#!)", GOLDEN.with_stem(golden).read_text(), flags=re.M)[1:]):
        (tmp_path / f"{number}.sh").write_text(script)
        # 1091: it does not follow `source`; 2016: that $HOME is not expanded is the point
        done = subprocess.run(
            ["shellcheck", "-e", "1091,2016", tmp_path / f"{number}.sh"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """sbatch that answers 12 for an array and 13 for the other, or refuses that; what it and scancel are told."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name: str, text: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $@" >>"{tmp_path}/calls"\n{text}\n')
        (folder / name).chmod(0o755)

    write("sbatch", 'case "$*" in *afterok*) echo "13;cluster" ;; *) echo "12;cluster" ;; esac')
    write("scancel", "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return write


def write_job(folder: Path, **keys) -> Path:
    values = {**LEAST, "then": ["finish"], "output": str(folder / "logs"), **keys}
    (folder / "job.yaml").write_text(json.dumps(values))
    return folder / "job.yaml"


def test_submit_sends_both_and_tells_where_all_is(stand_ins, tmp_path, capsys):
    file, logs = write_job(tmp_path), tmp_path / "logs"
    assert main(["submit", str(file)]) == 0
    assert capsys.readouterr().out == (
        f"job     12, 3 tasks\nscript  {logs}/job-12.sbatch\nlogs    {logs}/job-12_TASK.log\n"
        f"then    13, when all tasks have succeeded\nscript  {logs}/job-then-13.sbatch\nlog     {logs}/job-then-13.log\n"
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.sub(r" \S*\.tmp submitted$", "", call) for call in calls] == [
        "sbatch --parsable",
        "sbatch --parsable --dependency=afterok:12",
    ]
    job = load_job(file, [])
    assert (logs / "job-12.sbatch").read_text() == slurm_array.render_array(job, build_command(job))
    assert (logs / "job-then-13.sbatch").read_text() == slurm_array.render_then(job)
    assert sorted(os.listdir(logs)) == ["job-12.sbatch", "job-then-13.sbatch"]


def test_without_a_last_job_one_is_sent(stand_ins, tmp_path, capsys):
    assert main(["submit", str(write_job(tmp_path, then=None))]) == 0
    assert "then" not in capsys.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("scancel", "message"),
    [("exit 0", "The array, job 12, was cancelled"), ("exit 1", "job 12, is queued and could not be cancelled")],
)
def test_an_array_whose_last_job_is_refused_is_cancelled(scancel, message, stand_ins, tmp_path, capsys):
    stand_ins("sbatch", 'case "$*" in *afterok*) echo "sbatch: error: no" >&2; exit 1 ;; *) echo 12 ;; esac')
    stand_ins("scancel", scancel)
    assert main(["submit", str(write_job(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert "then: sbatch refused the job: no. " in error and message in error and error.count("\n") == 1
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scancel 12"
    assert os.listdir(tmp_path / "logs") == ["job-12.sbatch"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    job = make_job(working_directory=str(tmp_path / "none"))
    with pytest.raises(UserError, match="working_directory: .*none: no such folder"):
        slurm_array.submit(job)
