"""A real Slurm cluster for tests, and jobs on it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAB = ROOT / "tests/slurm-lab"
PROBE = str(Path(__file__).with_name("rank_probe.py"))
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")
LIMIT_S = 90


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
        self.folder, self.place = folder, folder / "lab"
        self.environment = {
            **os.environ,
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    @classmethod
    @contextlib.contextmanager
    def up(cls, folder: Path, nodes: int, *options: str) -> Iterator["Cluster"]:
        reason = why_not()
        if reason:
            pytest.skip(reason)
        cluster = cls(folder)
        try:
            cluster.lab("up", str(nodes), *options)
            yield cluster
        finally:
            cluster.lab("down")

    def lab(self, *words: str) -> None:
        subprocess.run([LAB, "-d", self.place, *words], check=True, timeout=60)

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

    def write_job(self, folder: Path, *mode: str, **keys) -> Path:
        folder.mkdir(exist_ok=True)
        values = {
            "name": "probe", "command": [sys.executable, PROBE, *mode], "python": sys.executable,
            "nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 1, "memory_gib_per_node": 1, "time_limit_min": 10,
            "working_directory": str(folder), "run": "run", "preflight": {"enabled": False}, **keys,
        }  # fmt: skip
        file = folder / "job.yaml"
        file.write_text(json.dumps(values))
        return file

    def submit(self, folder: Path, *mode: str, **keys) -> "Job":
        file = self.write_job(folder, *mode, **keys)
        return self.job(folder, self.run(sys.executable, "-m", "launch", "submit", file))

    def start_submit(self, folder: Path, *mode: str, **keys) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch", "submit", str(self.write_job(folder, *mode, **keys))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, **pipes)

    def job(self, folder: Path, printed: str) -> "Job":
        return Job(self, folder, folder / "job.yaml", printed)

    def wait_for(self, condition, job: "Job", limit_s: float = LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"waited too long: {job.story()}"
            time.sleep(0.2)


class Job:
    """A submitted job, by what `submit` has printed."""

    def __init__(self, cluster: Cluster, folder: Path, file: Path, printed: str):
        self.cluster, self.folder, self.file = cluster, folder, file
        found = re.match(r"job     (\d+)(?:, then .*)?\nrun     (.*)\nscript  (.*)\nlogs    (.*)\nnext ", printed)
        assert found, printed
        self.id, self.run, self.script, self.logs = found.groups()

    def facts(self) -> tuple[str, str, int]:
        """State, exit code and number of restarts, as Slurm has them."""
        text = self.cluster.run("scontrol", "show", "job", self.id)
        state, code = re.search(r"JobState=(\w+)", text)[1], re.search(r"\bExitCode=(\S+)", text)[1]
        return state, code, int(re.search(r"\bRestarts=(\d+)", text)[1])

    def wait_for_end(self, *states: str) -> None:
        self.cluster.wait_for(lambda: self.facts()[0] in states, self)

    def wait_until_ready(self) -> None:
        self.cluster.wait_for(lambda: self.rank_logs().count("ready\n") == 4, self)

    def follow(self) -> "Job":
        """The job that was submitted to take the place of this one."""
        file = Path(self.run) / "launch/jobs.jsonl"

        def records():
            found = [json.loads(line) for line in file.read_text().splitlines()]
            return [record["job_id"] for record in found if record["job_id"] not in (None, self.id)]

        self.cluster.wait_for(records, self)
        return self.again(f"job     {records()[-1]}\nrun     {self.run}\nscript  -\nlogs    {self.logs}\nnext ")

    def again(self, printed: str) -> "Job":
        return Job(self.cluster, self.folder, self.file, printed)

    def rank_logs(self) -> str:
        return "".join(path.read_text() for path in sorted(Path(self.logs).glob("rank-*.log")))

    def story(self) -> str:
        """All logs, for the message of a test that fails."""
        texts = [f"{path.name}:\n{path.read_text()}" for path in sorted(Path(self.logs).glob("*.log"))]
        events = Path(self.run) / "launch/events.jsonl"
        return "\n".join([str(self.facts()), *texts, events.read_text() if events.exists() else ""])
