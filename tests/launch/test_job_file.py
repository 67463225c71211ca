"""The job file: what it refuses, and that its example and its page name every key."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.__main__ import main
from launch.job import JobConfig, build_command, check_run_config
from pretrain.config import check_config, load_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs/launch/slurm.yaml"
LEAST = {"name": "job", "command": ["true"], "nodes": 1, "gpus_per_node": 1, "time_limit_min": 60}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nods=2", "nods: unknown key. Did you mean 'nodes'? Valid: kind, name,"),
        ("kind=local", "kind: unknown kind 'local'. Valid: slurm, slurm_array"),
        ("nodes=0", "nodes: should be greater than or equal to 1; found 0"),
        ("name=a b", "name: names the job's files"),
        ("command=[hostname]", "command: give either config"),
        ("config=null", "command: give either config"),
        ("python=''", "python: "),
        ("environment={A B: 1}", "environment: 'A B' is not the name"),
        ("environment={RANK: 1}", "environment: RANK is set by"),
        ("environment={A: true}", "environment.A: should be a valid string; found True"),
        ("extra_sbatch={partition: x}", "extra_sbatch: --partition is written from partition; set that"),
        ("extra_sbatch={gpus-per-task: 1}", "extra_sbatch: --gpus-per-task breaks the script"),
        ("extra_sbatch={--comment: x}", "extra_sbatch: '--comment' is not a long option"),
        ('extra_sbatch={comment: "a\\nb"}', "extra_sbatch.comment: goes into one #SBATCH line"),
        ('account="a\\n#SBATCH --uid=0"', "account: goes into one #SBATCH line"),
        ('working_directory="a\\nb"', "working_directory: goes into one #SBATCH line"),
        ('overrides=["a\\0b"]', "overrides.0: no program can be given a NUL"),
        ("output=logs/%j", "output: is a folder; Slurm gives '%'"),
        ("time_limit_min=6", "save_before_end_s: 300 s before the end"),
    ],
)
def test_a_wrong_job_file_is_refused_in_one_line(override, message, capsys):
    assert main(["render", str(EXAMPLE), override]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_overrides_do_not_go_with_a_command():
    with pytest.raises(UserError, match="overrides belong to config"):
        check_config(LEAST | {"overrides": ["a=1"]}, JobConfig, "job.yaml")


def test_the_command_of_a_rank():
    job = load_config(EXAMPLE, ["overrides=['run=a b', train.batch_size=64]", "python=/opt/my python"], JobConfig)
    words = ["/opt/my python", "-m", "pretrain", "train", "configs/vit_b16.yaml", "run=a b", "train.batch_size=64"]
    assert build_command(job) == words


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "vit.yaml: no such file. Did you mean 'vit_b16.yaml'?"),
        ("a: [", [], "not valid YAML"),
        ("a: 1", ["train.steps"], "write key=value"),
    ],
)
def test_a_run_config_that_cannot_be_read_is_refused_before_submission(tmp_path, text, overrides, message):
    (tmp_path / "vit_b16.yaml").write_text("a: 1")
    if text:
        (tmp_path / "vit.yaml").write_text(text)
    values = {**LEAST, "command": None, "config": "vit.yaml", "overrides": overrides}
    with pytest.raises(UserError, match=re.escape(message)):
        check_run_config(check_config(values, JobConfig, "job.yaml"), tmp_path)


def test_the_example_shows_every_key_with_its_default():
    text = EXAMPLE.read_text()
    shown = load_config(EXAMPLE, [], JobConfig).model_dump()
    least = check_config(LEAST, JobConfig, "job.yaml").model_dump()
    for key, field in JobConfig.model_fields.items():
        assert re.search(rf"^(# )?{key}: ", text, re.MULTILINE) or f"\n{key}:  #" in text, key
        if not field.is_required() and field.default not in (None, [], {}):
            assert shown[key] == least[key], key


def test_the_page_explains_every_key():
    page = (ROOT / "docs/launch.md").read_text()
    assert [key for key in JobConfig.model_fields if f"| `{key}` |" not in page] == []


def test_the_trainer_and_the_script_agree_on_the_exit_code():
    trainer = (ROOT / "pretrain/signals.py").read_text()
    assert re.search(r"^EXIT_SAVED = 85\b", trainer, re.MULTILINE)


def test_launch_stays_light():
    code = "import sys, launch.__main__; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = set(loaded.stdout.split())
    assert {name for name in modules if name.startswith(("pretrain.", "data_tools."))} == {
        "pretrain.config",
        "data_tools.errors",
    }
    assert "torch" not in modules
