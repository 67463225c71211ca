"""What submit keeps and refuses, what follows a job, and what status tells: with stand-ins for Slurm's programs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch import slurm, snapshot, status, submit, successor
from launch.__main__ import main
from launch.events import append_event, read_launch_events
from launch.job import JobConfig, ResolvedJob, resolve_job
from pretrain.config import check_config

LEAST = {"name": "job", "command": ["true"], "nodes": 1, "gpus_per_node": 1, "time_limit_min": 60, "run": "run"}
TOLD = {
    "sbatch": 'echo "sbatch $@" >>"$CALLS"; echo $(($(grep -c ^sbatch "$CALLS") + 11))',
    "squeue": 'cat "$FOLDER/queue" 2>/dev/null; exit 0',
    "scontrol": 'echo "scontrol $@" >>"$CALLS"\n[ "$2 $3" != "show job" ] || cat "$FOLDER/job"',
    "scancel": 'echo "scancel $@" >>"$CALLS"',
    "sacct": "exit 1",
}
AWAY = "echo 'NAME: error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


class Slurm:
    """Stand-ins for Slurm's programs on PATH; `queue` is what squeue prints, `job` what scontrol shows of a job."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name, text in TOLD.items():
            self.write(name, text)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("FOLDER", str(folder))
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(snapshot, "take_code", lambda job: [])

    def write(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text.replace('NAME', name)}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def said(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def show(self, state: str = "RUNNING", restarts: int = 0, more: str = "") -> None:
        text = f"JobId=12 JobState={state} Reason=None Restarts={restarts} ExitCode=0:0 NodeList=node[1-2] {more}"
        (self.folder / "job").write_text(text + "\n")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return Slurm(tmp_path, monkeypatch)


def make_job(folder: Path, **keys) -> ResolvedJob:
    return resolve_job(check_config({**LEAST, "working_directory": str(folder), **keys}, JobConfig, "job.yaml"))


# What submit keeps.


def test_the_code_is_what_git_tracks_and_does_not_ignore(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    files = {
        "a.py": "1",
        "it's $(x)/b.py": "2",
        "ignored.py": "3",
        ".gitignore": "ignored.py\n",
        "run/x": "4",
        "new.py": "5",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "large.bin").write_bytes(bytes(snapshot.LARGEST_FILE + 1))
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    git("add", "a.py", ".gitignore", "it's $(x)/b.py")
    git("commit", "-qm", "x")
    job = make_job(tmp_path)
    for _ in range(2):
        notes = snapshot.take_code(job)
    code = job.launch / "code"
    own = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert {name for name in own if not name.startswith(snapshot.PACKAGES)} == {
        "a.py",
        "it's $(x)/b.py",
        ".gitignore",
        "new.py",
    }
    assert {f"{package}/__init__.py" for package in snapshot.PACKAGES} < own, "the supervisors need these"
    assert notes == ["left out of the copy of the code, as larger than 2.0 MB: large.bin (2.0 MB)"]
    assert sorted(path.name for path in job.launch.iterdir()) == ["code"]


def test_too_much_to_be_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "LARGEST_CODE", 10)
    (tmp_path / "a").write_text("x" * 11)
    with pytest.raises(UserError, match="that is no code. Put data and results into .gitignore"):
        snapshot.copy_files(tmp_path, ["a"], tmp_path / "copy")


def test_the_config_is_checked_in_the_setup_of_the_job(tmp_path):
    (tmp_path / "python").write_text(
        '#!/bin/sh\n[ "$1" != -c ] || { echo "--- resolved config --- True"; exit; }\n'
        'echo "$@ $FROM_SETUP $FROM_JOB" >said; [ "$FAIL" ] || { echo "run: x"; exit; }\necho noise >&2\necho "error: $FAIL" >&2; exit 2\n'
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "c.yaml").write_text("run: x")
    keys = {"command": None, "config": "c.yaml", "overrides": ["a=1 2"], "python": str(tmp_path / "python")}
    keys |= {"setup": ["echo run: noise", "export FROM_SETUP=yes"], "environment": {"FROM_JOB": "a 'b'"}}
    job = make_job(tmp_path, **keys)
    assert snapshot.check_config(job, None) == ("run: x\n", [])
    assert (tmp_path / "said").read_text() == f"-m pretrain train c.yaml a=1 2 run={tmp_path}/run --check yes a 'b'\n"
    with pytest.raises(UserError, match=r"^c.yaml: lr: unknown key\.$"):
        snapshot.check_config(make_job(tmp_path, **{**keys, "setup": ["export FAIL='c.yaml: lr: unknown key.'"]}), None)


def test_submit_keeps_what_runs_and_tells_where(cluster, tmp_path, capsys):
    job = make_job(tmp_path)
    assert main(["submit", write_file(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"job     12\nrun     {job.run}\nscript  {job.launch}/job.sbatch\nlogs    {job.launch}/logs\n"
        "next    python -m launch status run\n"
    )
    assert ResolvedJob.model_validate_json((job.launch / "job.json").read_text()) == job
    assert (job.launch / "secret").stat().st_mode & 0o777 == 0o600
    (call,) = cluster.said()
    token = call.split()[-1]
    assert call == f"sbatch --parsable {job.launch}/job.sbatch {token}"
    (record,) = submit.read_records(Path(job.run))
    assert (record["job_id"], record["token"], record["log"]) == ("12", token, f"{job.launch}/logs/job-12.log")
    assert [event["event"] for event in read_launch_events(job.run)] == ["submitted"]


def write_file(folder: Path, **keys) -> str:
    (folder / "job.yaml").write_text(json.dumps({**LEAST, **keys}))
    return str(folder / "job.yaml")


def test_the_jobs_of_a_chain_wait_for_each_other(cluster, tmp_path):
    assert main(["submit", write_file(tmp_path, chain=3, singleton=True)]) == 0
    assert [call.split()[2] for call in cluster.said()] == [
        "--dependency=singleton", "--dependency=afterany:12,singleton", "--dependency=afterany:13,singleton",
    ]  # fmt: skip


def test_a_chain_that_is_refused_halfway_is_taken_back(cluster, tmp_path, capsys):
    cluster.write(
        "sbatch",
        f"{TOLD['sbatch']}; [ $(grep -c ^sbatch $CALLS) != 3 ] || {{ echo 'sbatch: error: too many' >&2; exit 1; }}",
    )
    assert main(["submit", write_file(tmp_path, chain=3)]) == 2
    assert "sbatch refused the job: too many. The jobs of the chain before it were cancelled" in capsys.readouterr().err
    assert cluster.said()[-1] == "scancel 12 13"


def test_nodes_that_broke_are_left_out(cluster, tmp_path, capsys):
    (tmp_path / "cluster.yaml").write_text("{}")
    (tmp_path / "bad_nodes.json").write_text(json.dumps({"node7": [{"time": 1, "run": "x", "reason": "ECC"}]}))
    assert main(["submit", write_file(tmp_path, cluster="cluster.yaml", exclude="node3")]) == 0
    assert "#SBATCH --exclude=node3,node7\n" in (tmp_path / "run/launch/job.sbatch").read_text()
    assert "without node7" in capsys.readouterr().err
    (tmp_path / "bad_nodes.json").write_text(json.dumps({"node3": [], "node8": []}))  # 7 is mended
    assert main(["resume", "run"]) == 0
    assert "#SBATCH --exclude=node3,node8\n" in (tmp_path / "run/launch/job.sbatch").read_text()


@pytest.mark.parametrize(
    ("taken", "queue", "sent"),
    [
        (True, "12|PENDING|None|||{script} {token}", 1),  # it was submitted, but nobody said so
        (False, "11|PENDING|None|||{script} other", 2),  # it was not
    ],
)
def test_a_controller_that_goes_away_in_that_moment_doubles_no_job(cluster, tmp_path, taken, queue, sent, capsys):
    queue = queue.replace("{script}", '"$3"').replace("{token}", '"$4"').replace("|", r"\|")
    cluster.write(
        "sbatch",
        f"{TOLD['sbatch']} >out\n[ $(grep -c ^sbatch $CALLS) = 1 ] || {{ cat out; exit; }}\n"
        f'echo {queue.replace("$3", "$2").replace("$4", "$3")} >"$FOLDER/queue"; {AWAY}',
    )
    assert main(["submit", write_file(tmp_path)]) == 0
    assert sum(call.startswith("sbatch") for call in cluster.said()) == sent
    assert "job     12\n" in (out := capsys.readouterr().out) or sent == 2, out


def test_nobody_knows_is_said_and_the_job_is_found_later(cluster, tmp_path, capsys, monkeypatch):
    cluster.write("sbatch", f'echo "12|RUNNING|None|||$2 $3" >"$FOLDER/sent"; {AWAY}')
    cluster.write("squeue", AWAY)
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.0)
    assert main(["submit", write_file(tmp_path)]) == 2
    assert "Whether the job is queued is not known" in capsys.readouterr().err
    assert main(["submit", write_file(tmp_path)]) == 2
    assert "whether a job of this run is there already is not known" in capsys.readouterr().err
    cluster.write("squeue", 'cat "$FOLDER/sent"')
    assert main(["submit", write_file(tmp_path)]) == 2
    assert "job 12 of this run is running. Wait for it" in capsys.readouterr().err


# What follows a job.


@pytest.fixture
def in_job(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    cluster.show()
    return cluster


def test_the_job_is_queued_again_once(in_job, tmp_path):
    job = make_job(tmp_path)
    assert successor.continue_job(job, "time_limit", []) == "requeue"
    assert in_job.said()[-1] == "scontrol requeue 12"
    in_job.show("COMPLETING", restarts=1)
    assert successor.continue_job(job, "time_limit", []) == "requeue", "by another leader"
    assert in_job.said().count("scontrol requeue 12") == 1


def test_a_new_job_leaves_out_the_bad_nodes(in_job, tmp_path):
    job = make_job(tmp_path, exclude="node9")
    submit.send(job)
    Path(job.bad_nodes).write_text(json.dumps({"node1": [], "node2": []}))
    assert successor.continue_job(job, "node", ["node2"]) == "resubmit"
    sent = f"sbatch --parsable --exclude=node9,node1,node2 --dependency=afterany:12 {job.launch}/job.sbatch after-12-0"
    assert in_job.said()[-1] == sent and "scontrol requeue 12" not in in_job.said()


@pytest.mark.parametrize(
    ("reason", "keys", "state", "how"),
    [
        ("cancel", {}, "RUNNING", None),
        ("time_limit", {"requeue": False}, "RUNNING", None),
        ("time_limit", {}, "CANCELLED", None),
        ("time_limit", {"chain": 2}, "RUNNING", None),  # that was the last
        ("time_limit", {}, "RUNNING", "requeue"),
    ],
)
def test_what_is_not_continued(in_job, tmp_path, reason, keys, state, how):
    in_job.show(state)
    assert successor.continue_job(make_job(tmp_path, **keys), reason, []) == how
    assert ("scontrol requeue 12" in in_job.said()) == (how is not None)


def test_success_is_a_file(in_job, tmp_path):
    job = make_job(tmp_path)
    job.launch.mkdir(parents=True)
    (tmp_path / "run/done.json").touch()
    assert successor.continue_job(job, "time_limit", []) is None


def test_where_preemption_cancels_a_new_job_takes_the_place(in_job, tmp_path):
    in_job.show(more="PreemptTime=2026-01-01T00:00:00")
    in_job.write(
        "scontrol",
        TOLD["scontrol"] + '\n[ "$2 $3" != "show partition" ] || echo "PartitionName=a Default=YES PreemptMode=CANCEL"',
    )
    job = make_job(tmp_path)
    submit.send(job)
    assert successor.continue_job(job, "preemption", []) == "resubmit"
    assert successor.continue_job(job, "preemption", []) == "resubmit"
    sent = [call for call in in_job.said() if call.startswith("sbatch")][1:]
    assert sent[0] == f"sbatch --parsable --dependency=afterany:12 {job.launch}/job.sbatch after-12-0"
    assert len({call.split()[-1] for call in sent}) == 1, "of one submission, only one job runs"
    assert "scontrol requeue 12" not in in_job.said()


def test_the_next_job_of_a_chain_leaves_out_the_bad_nodes(in_job, tmp_path):
    job = make_job(tmp_path, chain=2)
    submit.send(job)
    (in_job.folder / "queue").write_text("12|RUNNING|None|||x\n13|PENDING|Dependency|||x\n99|PENDING|None|||x\n")
    assert successor.continue_job(job, "node", ["node2"]) == "resubmit"
    assert in_job.said()[-1] == "scontrol update JobId=13 ExcNodeList=node2"


def test_a_run_without_progress_stops_itself(in_job, tmp_path, monkeypatch):
    job = make_job(tmp_path, max_lives_without_checkpoint=3)
    append_event(job.run, "submitted", job_id="12")

    def live(restarts: int) -> str | None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        in_job.show(restarts=restarts)
        return successor.continue_job(job, "time_limit", [])

    assert [live(0), live(1)] == ["requeue", "requeue"]
    (tmp_path / "run/checkpoints/step_00000010").mkdir(parents=True)
    assert [live(2), live(3), live(4)] == ["requeue", "requeue", None]
    stopped = (job.launch / "stopped").read_text()
    assert stopped == "87 12 3 jobs in a row have made no new checkpoint; the newest is that of step 10\n"
    append_event(job.run, "submitted", job_id="12")  # somebody goes on
    assert live(5) == "requeue"
    assert successor.continue_job(make_job(tmp_path, max_restarts=0), "node", []) is None


def test_in_a_container_the_batch_script_asks(in_job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = make_job(tmp_path)
    assert successor.continue_job(job, "time_limit", []) == "requeue"
    assert (job.launch / "jobs/12-0/requeue").exists()


# What Slurm says.


def test_a_job_that_the_controller_has_forgotten_is_looked_for_in_the_accounts(cluster):
    cluster.write("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.query_job("12") is None
    cluster.write("sacct", "echo 'CANCELLED by 0|85:0|node[1-2]|2026-01-01T00:00:00|2026-01-01T01:00:00'")
    found = slurm.query_job("12")
    assert (found.state, found.exit_code, found.nodes, found.source) == ("CANCELLED", 85, "node[1-2]", "sacct")
    assert not found.active


def test_a_program_that_hangs_is_not_waited_for(cluster):
    cluster.write("squeue", "exec sleep 60")
    began_s = time.monotonic()
    with pytest.raises(slurm.ControllerAway, match="squeue: no answer in 0.2 s"):
        slurm.call("squeue", timeout_s=0.2)
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    ("partition", "partitions", "config", "mode"),
    [
        (
            "spot",
            "PartitionName=main Default=YES PreemptMode=OFF\nPartitionName=spot Default=NO PreemptMode=REQUEUE",
            "",
            "REQUEUE",
        ),
        (
            None,
            "PartitionName=main Default=YES PreemptMode=OFF\nPartitionName=spot Default=NO PreemptMode=REQUEUE",
            "",
            "OFF",
        ),
        ("main", "PartitionName=main Default=YES", "PreemptMode             = GANG,CANCEL", "CANCEL"),
        ("main", "", "", ""),
    ],
)
def test_the_preempt_mode_is_the_partitions_else_the_clusters(cluster, partition, partitions, config, mode):
    cluster.write("scontrol", f"[ \"$*\" = 'show config' ] && echo '{config}' || echo '{partitions}'")
    assert slurm.preempt_mode(partition) == mode


# What status tells.


@pytest.fixture
def run(cluster, tmp_path) -> Path:
    """A run in step 600 of 1,000, with 8 nodes, whose job runs."""
    job = make_job(tmp_path)
    submit.send(job)
    now, run = time.time(), tmp_path / "run"
    events = [
        {"event": "start", "step": 0, "steps": 1000, "world_size": 16},
        {"event": "save", "step": 500, "stall_s": 2.0},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps({"time": now - 100, **event}) + "\n" for event in events))
    metrics = {"step": 590, "loss/total": 3.14159, "rate/samples_per_s": 1234.5, "time/step_s": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + '\n{"step": 6')
    (run / "progress").mkdir()
    for rank in range(2):
        facts = {
            "time": now - 1,
            "rank": rank,
            "host": f"node{rank}",
            "step": 600 - rank,
            "phase": "step",
            "since": now - 3,
        }
        (run / "progress" / f"rank-{rank:05d}.json").write_text(json.dumps(facts))
    state = {
        "time": now,
        "life": 3,
        "phase": "run",
        "nodes": {f"node{i}": {"state": "active"} for i in range(8)},
        "spares": [],
    }
    (run / "launch/state.json").write_text(json.dumps(state))
    append_event(run, "fault", kind="silent", node="node8", detail="x" * 300)
    (cluster.folder / "queue").write_text("12|RUNNING|None|node[1-2]|2026-01-01T00:00:00|x\n")
    cluster.show(more="StartTime=2026-01-01T00:00:00 EndTime=2026-01-02T00:00:00")
    return run


def test_status_is_told_in_80_columns(run, capsys):
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for line in (
        "state      running",
        "job        12 running on node[1-2], since 2026-01-01T00:00:00, ends",
        "progress   step 600 of 1,000 (60.0%), loss 3.142 at step 590",
        "speed      1,234.5 samples/s, 0.5 s a step, 3 min 20 s left",
        "saved      step 500, 1 min 40 s ago",
        "nodes      life 3, run: node0 active, node1 active,",
    ):
        assert f"\n{line}" in text, (line, text)


def test_status_without_the_controller_is_from_the_runs_own_files(run, cluster, capsys):
    for name in ("squeue", "scontrol"):
        cluster.write(name, AWAY)
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert "state      running\n" in text and "Slurm does not answer (squeue: Unable to contact" in text
    assert "3 min 20 s left" in text
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 600
    assert main(["list", str(run.parent)]) == 0
    assert "running         600     1,000           12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("queue", "state", "files", "word"),
    [
        ("12|PENDING|Priority||N/A|x", "PENDING", [], "queued"),
        ("", "COMPLETED", ["done.json"], "done"),
        ("", "FAILED", ["launch/stopped"], "stopped"),
        ("", "TIMEOUT", [], "ended"),
        ("12|COMPLETING|None|node1|N/A|x", "COMPLETING", ["done.json"], "ending"),
    ],
)
def test_the_state_in_one_word(run, cluster, queue, state, files, word):
    (cluster.folder / "queue").write_text(queue + "\n" if queue else "")
    cluster.show(state)
    for name in files:
        (run / name).write_text("85 - cancelled by me\n")
    assert status.collect(run)["state"] == word


def test_top_shows_who_is_behind_first(run, capsys):
    assert main(["top", str(run)]) == 0
    ranks = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[:3] for line in ranks[1:]] == [["1", "node1", "599"], ["0", "node0", "600"]]


def test_logs_are_merged_with_host_and_rank_and_followed(run, capsys):
    logs = run / "launch/logs"
    append_event(run, "life_start", life=1, ranks={"node1": [0], "node2": [1]})
    (logs / "rank-00000.log").write_text("a\nb\nc\n")
    (logs / "rank-00001.log").write_text("=== life 2 node3 rank 1 2026 ===\nd\ne")
    assert main(["logs", str(run), "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "node1:0 | b", "node1:0 | c", "node3:1 | === life 2 node3 rank 1 2026 ===", "node3:1 | d",
    ]  # fmt: skip
    assert main(["logs", str(run), "--rank", "7"]) == 2
    assert "no rank has a log yet of those asked for" in capsys.readouterr().err
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "launch", "logs", str(run), "-f", "-n", "1", "--rank", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline()]
            (logs / "rank-00001.log").open("a").write("f\n=== life 3 node4 rank 1 2026 ===\ng\n")
            lines += [process.stdout.readline() for _ in range(3)]
        finally:
            process.kill()
    assert [line.rstrip() for line in lines[:2] + lines[3:]] == ["node3:1 | d", "node3:1 | ef", "node4:1 | g"]


def test_cancelled_is_remembered_and_resume_forgets_it(run, cluster, capsys):
    assert main(["cancel", str(run)]) == 0
    assert cluster.said()[-1] == "scancel 12", "no supervisor is there to be asked"
    cluster.show("CANCELLED")
    (cluster.folder / "queue").write_text("")
    assert status.collect(run)["state"] == "stopped"
    (run / "STOP").touch()
    assert main(["resume", str(run)]) == 0
    assert not (run / "STOP").exists() and not (run / "launch/stopped").exists()
    assert [record["job_id"] for record in submit.read_records(run)] == ["12", "13"]


@pytest.mark.parametrize("place", ["none", "job.yaml"])
def test_what_is_no_run_is_refused(cluster, tmp_path, place, capsys):
    write_file(tmp_path)
    assert main(["status", place]) == 2
    assert (
        "holds no launch/job.json. Give the run folder of a submitted job, or its job file" in capsys.readouterr().err
    )


def test_durations_are_for_people():
    assert [status.format_s(s) for s in (4.9, 200, 7680, 273600)] == ["4 s", "3 min 20 s", "2 h 08 min", "3 d 4 h"]
