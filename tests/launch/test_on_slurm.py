"""Jobs on a real Slurm cluster: three nodes in namespaces of this machine, started by tests/slurm-lab."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAB = ROOT / "tests/slurm-lab"
PROBE = str(Path(__file__).with_name("rank_probe.py"))
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")
LIMIT_S = 60

pytestmark = pytest.mark.slurm


def why_not() -> str:
    """Why no cluster can be started here, or ""."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)"
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode:
        return "this machine does not let root make namespaces"
    return ""


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self.lab = folder, folder / "lab"
        self.environment = {**os.environ, "PATH": f"{self.lab / 'bin'}:{os.environ['PATH']}"}

    def run(self, *words: object) -> str:
        """Run a command on the login node."""
        result = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def submit(self, folder: Path, *mode: str, **keys) -> "Job":
        folder.mkdir(exist_ok=True)
        values = {
            "name": "probe", "command": [sys.executable, PROBE, *mode], "python": sys.executable,
            "nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 1, "memory_gib_per_node": 1, "time_limit_min": 10,
            "working_directory": str(folder), "output": "logs", **keys,
        }  # fmt: skip
        file = self.folder / "job.yaml"
        file.write_text(json.dumps(values))
        printed = self.run(sys.executable, "-m", "launch", "submit", file)
        job_id, script, log = re.fullmatch(
            r"job     (\d+)\nscript  (.*)\nlog     (.*), and one for each rank in .*\n", printed
        ).groups()
        assert Path(script).read_text() == self.run(sys.executable, "-m", "launch", "render", file)
        return Job(self, job_id, Path(log))


class Job:
    def __init__(self, cluster: Cluster, job_id: str, log: Path):
        self.cluster, self.id, self.log, self.logs = cluster, job_id, log, log.with_suffix("")

    def facts(self) -> tuple[str, str, int]:
        """State, exit code and number of restarts, as Slurm has them."""
        text = self.cluster.run("scontrol", "show", "job", self.id)
        state, code = re.search(r"JobState=(\w+)", text)[1], re.search(r"\bExitCode=(\S+)", text)[1]
        return state, code, int(re.search(r"\bRestarts=(\d+)", text)[1])

    def wait_for_end(self, *states: str) -> None:
        wait_for(lambda: self.facts()[0] in states, self)

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.rank_logs().count("ready") == 4, self)

    def rank_logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.glob("rank-*.log")))

    def story(self) -> str:
        log = self.log.read_text() if self.log.exists() else ""
        return f"{self.facts()}\n{log}\n{self.rank_logs()}"


def wait_for(condition, job: Job) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited too long: {job.story()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        subprocess.run([LAB, "-d", cluster.lab, "up", "3", "--gpus", "2"], check=True, timeout=60)
        yield cluster
    finally:
        subprocess.run([LAB, "-d", cluster.lab, "down"], check=True, timeout=60)


def test_every_rank_knows_its_place_and_meets_the_others(cluster, tmp_path):
    job = cluster.submit(tmp_path, "meet", "met.json")
    job.wait_for_end("COMPLETED")
    met = json.loads((tmp_path / "met.json").read_text())
    assert [rank["RANK"] for rank in met] == [rank["SLURM_PROCID"] for rank in met] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in met] == [rank["SLURM_LOCALID"] for rank in met] == ["0", "1", "0", "1"]
    assert [rank["SLURMD_NODENAME"] for rank in met] == ["node1", "node1", "node2", "node2"]
    assert {(rank["WORLD_SIZE"], rank["SLURM_NTASKS"], rank["MASTER_ADDR"]) for rank in met} == {("4", "4", "node1")}
    assert len({rank["MASTER_PORT"] for rank in met}) == 1
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in met} == {"0,1"}, "each rank sees all GPUs of its node"
    assert sorted(path.name for path in job.logs.glob("rank-*")) == [
        "rank-0000-node1.log",
        "rank-0001-node1.log",
        "rank-0002-node2.log",
        "rank-0003-node2.log",
    ]


def test_hostile_values_arrive_as_they_are(cluster, tmp_path):
    hostile = ["$(touch PWNED)", "'; touch PWNED; '", '"\\\n`touch PWNED`', "a  b", "%j", ""]
    comment = "say \"hi\" 'x' \\b $(touch PWNED) `touch PWNED` # no; --uid=0"
    folder = tmp_path / 'it\'s a "$(touch PWNED)" folder'
    job = cluster.submit(
        folder, "say", "said.json", *hostile, environment={"HOSTILE": hostile[2]}, output="my 'logs' $(touch PWNED)",
        extra_sbatch={"comment": comment},
    )  # fmt: skip
    job.wait_for_end("COMPLETED")
    said = json.loads((folder / "said.json").read_text())
    assert said["words"] == hostile
    assert said["environment"]["HOSTILE"] == hostile[2]
    assert cluster.run("squeue", "-h", "-t", "all", "-j", job.id, "-o", "%k") == comment + "\n"
    assert list(tmp_path.rglob("PWNED")) == []


def test_a_failing_rank_ends_the_job_with_its_exit_code(cluster, tmp_path):
    job = cluster.submit(tmp_path, "fail")
    job.wait_for_end("FAILED", "COMPLETED")
    assert job.facts() == ("FAILED", "7:0", 0), job.story()
    assert "rank 3 on node2 ended first, with exit code 7" in job.log.read_text()


def test_a_job_asked_to_save_is_queued_again_and_finishes(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train")
    job.wait_until_ready()
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)  # as Slurm does before the time limit
    job.wait_for_end("COMPLETED", "FAILED")
    assert job.facts() == ("COMPLETED", "0:0", 1), job.story()
    assert job.rank_logs().count("saved") == job.rank_logs().count("resumed, finished") == 4, "the logs are appended to"
    assert "restart 1" in job.log.read_text()


def test_a_preempted_job_is_queued_again_and_finishes(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train", partition="spot")
    job.wait_until_ready()
    cluster.run("sbatch", "-p", "main", "-N", 3, "--exclusive", "-t", 1, "-o", tmp_path / "other", "--wrap", "sleep 1")
    job.wait_for_end("COMPLETED", "FAILED")
    assert job.facts() == ("COMPLETED", "0:0", 1), job.story()
    assert job.rank_logs().count("saved") == 4


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train")
    job.wait_until_ready()
    cluster.run("scancel", job.id)
    wait_for(lambda: "not queued again" in job.log.read_text(), job)
    wait_for(lambda: cluster.run("squeue", "-h", "-j", job.id) == "", job)
    assert job.facts()[0] == "CANCELLED", job.story()


def test_what_sbatch_refuses_is_refused_in_one_line(cluster, tmp_path):
    with pytest.raises(AssertionError, match=r"^error: sbatch refused the job: .*[Ii]nvalid partition.*\n"):
        cluster.submit(tmp_path, "say", partition="nowhere")
    assert list(tmp_path.rglob("*.sbatch")) == []


def submit_array(cluster, folder: Path, **keys) -> tuple[str, str]:
    """Submit 4 tasks and a job after them; the numbers of both."""
    values = {
        "kind": "slurm_array", "name": "array", "tasks": 4, "cpus_per_task": 1, "memory_gib": 1, "time_limit_min": 10,
        "working_directory": str(folder), "output": "logs", "environment": {"PYTHONPATH": str(ROOT)}, **keys,
    }  # fmt: skip
    file = folder / "job.yaml"
    file.write_text(json.dumps(values))
    printed = cluster.run(sys.executable, "-m", "launch", "submit", file)
    array, last = re.search(r"^job     (\d+), 4 tasks$(?:.|\n)*^then    (\d+),", printed, re.MULTILINE).groups()
    scripts = [(folder / "logs" / f"{name}.sbatch").read_text() for name in (f"array-{array}", f"array-then-{last}")]
    assert "\n".join(scripts) == cluster.run(sys.executable, "-m", "launch", "render", file)
    return array, last


def wait_for_states(cluster, job_id: str, folder: Path) -> list[str]:
    """The states in which all tasks of a job have ended."""

    def logs() -> str:
        return "".join(f"{path.name}: {path.read_text()}" for path in sorted((folder / "logs").glob("*.log")))

    end = time.monotonic() + 2 * LIMIT_S
    while True:
        states = re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", job_id))
        if not set(states) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}:
            return states
        assert time.monotonic() < end, f"waited too long: {states}\n{logs()}"
        time.sleep(0.2)


def test_an_array_of_tasks_builds_what_one_process_builds(cluster, tmp_path):
    from data_tools.build import build_shards
    from data_tools.scenes import draw_scenes

    draw_scenes(tmp_path / "scenes", count=40, val_count=8, processes=1)
    table, images = tmp_path / "scenes" / "captions.tsv", tmp_path / "scenes" / "images"
    build_shards(table, tmp_path / "local", images, samples_per_shard=8, processes=1)
    build = [sys.executable, "-m", "data_tools", "build", str(table), "out", "--image-root", str(images)]
    array, last = submit_array(
        cluster,
        tmp_path,
        command=[*build, "--samples-per-shard", "8", "--processes", "1"],
        then=[sys.executable, "-m", "data_tools", "finish", "out"],
    )
    assert wait_for_states(cluster, last, tmp_path) == ["COMPLETED"]
    assert wait_for_states(cluster, array, tmp_path) == ["COMPLETED"] * 4
    logs = {path.name for path in (tmp_path / "logs").glob("*.log")}
    assert logs == {f"array-then-{last}.log", *(f"array-{array}_{task}.log" for task in range(1, 5))}
    assert "task 3 of 4 is done: 1 of 6 shards" in (tmp_path / "logs" / f"array-{array}_3.log").read_text()
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(json.loads(made["manifest.json"])["shards"]) == 6
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def test_after_a_task_that_fails_nothing_follows(cluster, tmp_path):
    array, last = submit_array(
        cluster, tmp_path, command=["sh", "-c", 'test "$0" != 3', "{task}"], then=["touch", "finished"]
    )
    assert sorted(wait_for_states(cluster, array, tmp_path)) == ["COMPLETED"] * 3 + ["FAILED"]
    assert wait_for_states(cluster, last, tmp_path) == ["CANCELLED"]
    assert not (tmp_path / "finished").exists()
