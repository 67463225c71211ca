"""The job file: what it refuses, and that its example and its page name every key."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.__main__ import main
from launch.job import (
    CLUSTER_KEYS,
    JobConfig,
    ResolvedJob,
    build_command,
    choose_notice_s,
    find_run,
    load_job,
    read_job,
    resolve_job,
)
from pretrain.config import check_config, load_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs/launch/slurm.yaml"
LEAST = {"name": "job", "command": ["true"], "nodes": 1, "gpus_per_node": 1, "time_limit_min": 60}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nods=2", "nods: unknown key. Did you mean 'nodes'? Valid: kind, name,"),
        ("kind=lokal", "kind: unknown kind 'lokal'. Valid: slurm, local, ssh, slurm_array"),
        ("kind=local", "nodes: kind: local is this machine alone; found 8, spares included. Set nodes=1"),
        ("kind=ssh", "hosts: kind: ssh needs hosts=[a, b] or hostfile=FILE"),
        ("{kind: ssh}", "override '{kind: ssh}': write key=value"),
        ("min_nodes=9", "min_nodes: 9 is more than nodes=8"),
        ("hosts=[a b]", "hosts.0: is a host as ssh takes it, such as node7 or me@node7; found 'a b'"),
        ("hosts=[-oProxyCommand=x]", "hosts.0: is a host"),
        ("container={runtime: docker, image: x}", "container.runtime: should be 'pyxis' or 'apptainer'"),
        ("container={runtime: pyxis, image: x, mount: []}", "container.mount: unknown key. Did you mean 'mounts'?"),
        ("preflight={enable: false}", "preflight.enable: unknown key. Did you mean 'enabled'?"),
        ("heartbeat_s=3.0", "heartbeat_s: a node would count as silent (node_silent_s=4.0) after less than two beats"),
        ("time_limit_min=null", "time_limit_min: is missing. Jobs on Slurm have a limit"),
        ("cluster=none.yaml", "none.yaml: cannot read the config"),
        ("cluster=configs/vit_b16.yaml", "configs/vit_b16.yaml: run: unknown key. Valid: partition, account,"),
        ("nodes=0", "nodes: should be greater than or equal to 1; found 0"),
        ("name=a b", "name: names the job's files"),
        ("command=[hostname]", "command: give either config"),
        ("config=null", "command: give either config"),
        ("python=''", "python: "),
        ("environment={A B: 1}", "environment: 'A B' is not the name"),
        ("environment={RANK: 1}", "environment: RANK is set by"),
        ("environment={MASTER_LISTEN_FD: 1}", "environment: MASTER_LISTEN_FD is set by"),
        ("environment={A: true}", "environment.A: should be a valid string; found True"),
        ("extra_sbatch={partition: x}", "extra_sbatch: --partition is written from partition; set that"),
        ("extra_sbatch={gpus-per-task: 1}", "extra_sbatch: --gpus-per-task breaks the script"),
        ("extra_sbatch={--comment: x}", "extra_sbatch: '--comment' is not a long option"),
        ('extra_sbatch={comment: "a\\nb"}', "extra_sbatch.comment: goes into one #SBATCH line"),
        ('account="a\\n#SBATCH --uid=0"', "account: goes into one #SBATCH line"),
        ('working_directory="a\\nb"', "working_directory: goes into one #SBATCH line"),
        ('overrides=["a\\0b"]', "overrides.0: no program can be given a NUL"),
        ("run=runs/%j", "run: is a folder; Slurm gives '%'"),
    ],
)
def test_a_wrong_job_file_is_refused_in_one_line(override, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["render", str(EXAMPLE), override]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_overrides_do_not_go_with_a_command():
    with pytest.raises(UserError, match="overrides belong to config"):
        check_config(LEAST | {"overrides": ["a=1"]}, JobConfig, "job.yaml")


def test_a_notice_that_would_come_before_the_start_is_refused():
    with pytest.raises(
        UserError, match="save_before_end_s: 300 s before the end, and up to 60 s sooner, is not within"
    ):
        check_config(LEAST | {"time_limit_min": 6, "save_before_end_s": 300}, JobConfig, "job.yaml")


def test_the_command_of_a_rank():
    job = load_config(
        EXAMPLE, ["overrides=[seed=1, train.batch_size=64]", "python=/opt/my python", "run=a b"], JobConfig
    )
    words = [
        "/opt/my python",
        "-m",
        "pretrain",
        "train",
        "configs/vit_b16.yaml",
        "seed=1",
        "train.batch_size=64",
        "run=a b",
    ]
    assert build_command(job) == words


def test_the_run_folder_is_the_jobs_or_the_configs_or_named_after_the_job(tmp_path):
    (tmp_path / "vit.yaml").write_text("run: runs/vit")
    config = {**LEAST, "command": None, "config": "vit.yaml"}
    jobs = [config, config | {"overrides": ["run=runs/b"]}, config | {"run": "runs/c"}, LEAST]
    found = [find_run(check_config(job, JobConfig, "job.yaml"), tmp_path) for job in jobs]
    assert found == ["runs/vit", "runs/b", "runs/c", "runs/job"]


def test_values_of_the_cluster_go_below_those_of_the_job(tmp_path):
    cluster, job = tmp_path / "cluster.yaml", tmp_path / "job.yaml"
    cluster.write_text(
        "{partition: gpu, account: lab, setup: [a], environment: {A: 1, B: 1}, extra_sbatch: {nice: 1, x: 1}, gpus_per_node: 4}"
    )
    values = "name: j, command: ['true'], nodes: 1, time_limit_min: 9, partition: long, account: null, setup: [b]"
    job.write_text(f"{{{values}, environment: {{B: 2}}, extra_sbatch: {{x: 2}}}}")
    found = load_job(job, [f"cluster={cluster}"])
    assert (found.partition, found.account, found.gpus_per_node) == ("long", "lab", 4)
    assert found.setup == ["a", "b"]
    assert found.environment == {"A": "1", "B": "2"}
    assert found.extra_sbatch == {"nice": "1", "x": "2"}
    assert resolve_job(found).bad_nodes == str(tmp_path / "bad_nodes.json")


@pytest.mark.parametrize(
    "cluster", sorted((ROOT / "configs/launch").glob("cluster_*.yaml")), ids=lambda path: path.stem
)
def test_the_examples_of_clusters_are_valid(cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert isinstance(resolve_job(load_job(EXAMPLE, [f"cluster={cluster}"])), ResolvedJob)
    assert load_job(ROOT / "configs/launch/build.yaml", [f"cluster={cluster}"]).kind == "slurm_array"


def test_a_resolved_job_is_read_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = resolve_job(load_job(EXAMPLE, []))
    assert (job.run, job.batch_size, job.save_before_end_s) == (str(ROOT / "runs/vit_b16"), 8192, 300)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert read_job(tmp_path / "job.json") == job
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(UserError, match="job.json: is not JSON"):
        read_job(tmp_path / "job.json")


def test_hosts_come_from_a_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# two\nnode1 slots=8\n\nme@node2   # the other\n")
    job = check_config({**LEAST, "kind": "ssh", "nodes": 2, "hostfile": str(tmp_path / "hosts")}, JobConfig, "job.yaml")
    assert resolve_job(job).hosts == ["node1", "me@node2"]
    (tmp_path / "hosts").write_text("node1\nnode1\n")
    with pytest.raises(UserError, match="node1 is there twice"):
        resolve_job(job)


@pytest.mark.parametrize(
    ("limit_min", "stalls_s", "notice_s"),
    [
        (1440, [], 300),
        (1440, [10.0], 120),
        (1440, [10.0, 100.0], 260),
        (5, [100.0], 90),
        (2, [], 0),
        (1440, [500] + [1] * 5, 120),
    ],
)
def test_the_notice_before_the_time_limit_is_measured(limit_min, stalls_s, notice_s):
    assert choose_notice_s(limit_min, stalls_s) == notice_s


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
        find_run(check_config(values, JobConfig, "job.yaml"), tmp_path)


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
    assert [key for key in CLUSTER_KEYS if key not in JobConfig.model_fields] == []


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
