"""Jobs without Slurm: on this machine, and on the nodes of a lab reached by ssh. The supervisors are the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import LAB, PROBE, ROOT, Cluster
from processes import list_working_in

from launch.__main__ import main
from launch.events import read_launch_events
from launch.job import JobConfig, resolve_job
from launch.local import find_alive, identify, start
from launch.submit import read_records, send
from pretrain.config import check_config

LEAST = {"name": "probe", "kind": "local", "nodes": 1, "gpus_per_node": 2, "python": sys.executable,
         "preflight": {"enabled": False}}  # fmt: skip


def write_job(folder: Path, *mode: str, **keys) -> Path:
    values = {
        **LEAST,
        "command": [sys.executable, PROBE, *mode],
        "working_directory": str(folder),
        "run": "run",
        **keys,
    }
    (folder / "job.yaml").write_text(json.dumps(values))
    return folder / "job.yaml"


def launch(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_job_on_this_machine_runs_and_its_code_is_the_commands(tmp_path):
    done = launch("submit", write_job(tmp_path, "meet", "met.json", environment={"NCCL_PROBE": "a b"}), "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    met = json.loads((tmp_path / "met.json").read_text())
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["NODE_RANK"]) for rank in met] == [("0", "0", "0"), ("1", "1", "0")]
    assert {rank["NCCL_PROBE"] for rank in met} == {"a b"}
    assert "localhost:0 | === life 1 localhost rank 0 " in done.stdout
    assert "state      ended" in launch("status", tmp_path / "run").stdout


@pytest.mark.parametrize(("restarts", "lives"), [(30, 2), (0, 1)])
def test_a_job_that_fails_ends_with_its_code(tmp_path, restarts, lives):
    """After a second life with the same failure, or the restarts that it has."""
    job = write_job(tmp_path, max_restarts=restarts)
    job.write_text(job.read_text().replace(PROBE, "-c").replace('"-c"', '"-c", "raise SystemExit(7)"'))
    done = launch("submit", job, "--wait")
    assert done.returncode == 7, done.stdout + done.stderr
    events = [event["event"] for event in read_launch_events(tmp_path / "run")]
    assert events.count("life_start") == lives


def test_cancel_saves_and_resume_goes_on(tmp_path):
    job = write_job(tmp_path, "train")
    assert launch("submit", job).returncode == 0
    wait_for(lambda: "ready" in launch("logs", job).stdout)
    refused = launch("submit", job)
    assert refused.returncode == 2 and "of this run is running. Wait for it, or end it first" in refused.stderr
    assert "to save and stop" in launch("cancel", tmp_path / "run").stdout
    wait_for(lambda: "state      stopped" in launch("status", tmp_path / "run").stdout)
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    done = launch("resume", tmp_path / "run", "--wait")
    assert done.returncode == 0 and "resumed, finished" in done.stdout, done.stdout + done.stderr


def test_cancel_now_leaves_nothing_running(tmp_path):
    assert main(["submit", str(write_job(tmp_path, "train"))]) == 0
    wait_for(lambda: "ready" in "".join(path.read_text() for path in (tmp_path / "run/launch/logs").glob("rank-*")))
    assert main(["cancel", str(tmp_path / "run"), "--now"]) == 0
    wait_for(lambda: not list_working_in(tmp_path))


def test_a_process_is_known_by_its_number_and_start(tmp_path):
    job = resolve_job(
        check_config({**LEAST, "command": ["true"], "working_directory": str(tmp_path)}, JobConfig, "job")
    )
    own = identify(Path("/proc/self/stat").read_text())
    assert own.startswith(f"{os.getpid()}.")
    assert find_alive(job, {"localhost": own}) == {"localhost": True}
    assert find_alive(job, {"localhost": f"{os.getpid()}.1"}) == {"localhost": False}, "a later process of that number"
    assert identify("") == identify("12 (a b) Z 1") == ""


def test_a_job_that_does_not_start_everywhere_starts_nowhere(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text(
        '#!/bin/bash\nhost=${@: -2:1}\n[ $host = node1 ] || { echo no route >&2; exit 255; }\nbash -c "${@: -1}"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    keys = {
        "kind": "ssh",
        "nodes": 2,
        "hosts": ["node1", "me@node2"],
        "command": ["true"],
        "working_directory": str(tmp_path),
    }
    job = resolve_job(check_config({**LEAST, **keys, "run": "run"}, JobConfig, "job"))
    (job.launch / "logs").mkdir(parents=True)
    (tmp_path / "start.sh").write_text("sleep 60\n")
    with pytest.raises(Exception, match="the job is not started: me@node2: no route"):
        start(job, tmp_path / "start.sh", "ssh-1")
    wait_for(lambda: not list_working_in(Path.cwd(), "start.sh"))
    with pytest.raises(Exception, match="not started"):
        job.launch.mkdir(parents=True, exist_ok=True)
        send(job)
    assert read_records(tmp_path / "run") == []


@pytest.mark.slurm
@pytest.mark.skipif(
    shutil.which("sshd") is None and not Path("/usr/sbin/sshd").exists(), reason="sshd is not installed"
)
def test_hosts_by_ssh(tmp_path):
    with Cluster.up(tmp_path, 2, "--ssh") as cluster:
        folder = tmp_path / "it's a folder"
        keys = {"kind": "ssh", "hosts": ["node1", "root@node2"], "time_limit_min": None}
        file = cluster.write_job(folder, "meet", "met.json", **keys)
        launch = [LAB, "-d", cluster.place, "exec", sys.executable, "-m", "launch"]  # names are known there
        cluster.environment["NCCL_PROBE"] = "it's $(mine)"  # of who submits
        cluster.run(*launch, "submit", file, "--wait")
        met = json.loads((folder / "met.json").read_text())
        assert [(rank["RANK"], rank["NODE_RANK"]) for rank in met] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
        assert {(rank["MASTER_ADDR"], rank["NCCL_PROBE"]) for rank in met} == {("10.77.0.11", "it's $(mine)")}
        cluster.run(*launch, "submit", cluster.write_job(folder, "train", **keys, run="train"))
        logs = folder / "train/launch/logs"
        wait_for(lambda: "".join(path.read_text() for path in logs.glob("rank-*")).count("ready\n") == 4)
        assert "running on node1,root@node2" in cluster.run(*launch, "status", folder / "train")
        cluster.run(*launch, "cancel", folder / "train")
        wait_for(lambda: "state      stopped" in cluster.run(*launch, "status", folder / "train"))
        assert len(list(folder.glob("saved-*"))) == 4


def wait_for(condition, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
