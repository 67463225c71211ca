"""A job under supervisors, for tests of faults: its nodes are supervisors on this machine, each with its own name."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import ROOT
from processes import list_children

from launch.events import read_launch_events
from launch.job import JobConfig, resolve_job
from pretrain.config import check_config

TRAINER = Path(__file__).with_name("stand_in_trainer.py")
AGENT = (
    "import sys; from data_tools.errors import run_command; from launch.agent import main; "
    "sys.exit(run_command(main, *sys.argv[1:]))"
)
PATIENCE_S = 60


def wait_for(condition: Callable[[], Any], what: str, story: Callable[[], str], patience_s: float = PATIENCE_S) -> Any:
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {patience_s} s for {what}:\n{story()}"
        time.sleep(0.02)
    return found


class Recorded:
    """What is on record in a run folder."""

    def __init__(self, run: Path) -> None:
        self.run, self.launch = run, run / "launch"

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in read_launch_events(self.run) if not names or event["event"] in names]

    def step(self) -> int:
        try:
            return json.loads((self.run / "progress" / "rank-00000.json").read_text())["step"]
        except (OSError, ValueError):
            return 0

    def metrics(self) -> list[dict[str, Any]]:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def story(self) -> str:
        """All that is known, for a test that fails."""
        logs = sorted(self.launch.glob("logs/*.log"))
        parts = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs]
        return "\n".join([*map(str, self.events()), *parts])

    def wait_for(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        return wait_for(condition, what, self.story, patience_s)

    def wait_for_event(self, name: str, count: int = 1, **facts: Any) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = [event for event in self.events(name) if facts.items() <= event.items()]
            return found[count - 1] if len(found) >= count else None

        return self.wait_for(look, f"event {name} {facts}")

    def check_exact(self, steps: int) -> None:
        """Each step once, with its own keys, and the losses of a run that nothing has disturbed."""
        batch, loss = 24, 0
        found = self.metrics()
        assert [entry["step"] for entry in found] == list(range(1, steps + 1)), self.story()
        for step, entry in enumerate(found):
            keys = list(range(step * batch, (step + 1) * batch))
            loss = (loss * 31 + sum(key * key for key in keys)) % 1_000_003
            assert (entry["keys"], entry["loss"]) == (keys, loss)


class Run(Recorded):
    """A run folder with a job in it."""

    def __init__(self, run: Path, command: list[str] | None = None, **job: Any) -> None:
        super().__init__(run)
        self.launch.mkdir(parents=True)
        values = {
            "name": "job",
            "run": str(run),
            "gpus_per_node": 2,
            "time_limit_min": 60,
            "preflight": {"enabled": False},
        }
        values |= {"command": command} if command else {}
        self.resolved = resolve_job(check_config({**values, **job}, JobConfig, "job"))
        (self.launch / "job.json").write_text(self.resolved.model_dump_json())


class LocalRun(Run):
    """Supervisors of nodes a, b, c ... on the loopback device."""

    def __init__(self, folder: Path, nodes: int, steps: int, step_s: float = 0.1, **job: Any) -> None:
        run = folder / "run"
        job = {"nodes": nodes, "start_wait_s": 20, **job}
        command = None if "config" in job else [sys.executable, str(TRAINER), str(run), str(steps), str(step_s)]
        super().__init__(run, command, **job)
        self.names = [chr(ord("a") + number) for number in range(nodes + job.get("spare_nodes", 0))]
        self.supervisors: dict[str, subprocess.Popen] = {}
        self.job = secrets.token_hex(4)

    def start(self, *names: str) -> "LocalRun":
        everyone = ",".join(f"{name}=127.0.0.1" for name in self.names)
        for name in names or self.names:
            command = [sys.executable, "-c", AGENT, str(self.launch / "job.json"), everyone, name, self.job]
            environment = {key: text for key, text in os.environ.items() if not key.startswith("SLURM_")}
            environment["PYTHONPATH"] = str(ROOT)
            self.supervisors[name] = subprocess.Popen(command, env=environment, start_new_session=True)
        return self

    def ranks_of(self, name: str) -> list[int]:
        """Process numbers of what the supervisor of a node has started."""
        return list_children(self.supervisors[name].pid)

    def signal_node(self, name: str, number: int) -> None:
        for pid in [self.supervisors[name].pid, *self.ranks_of(name)]:
            with contextlib.suppress(ProcessLookupError):  # a supervisor that goes on may have ended its ranks
                os.kill(pid, number)

    def end(self, name: str, patience_s: float = PATIENCE_S) -> int:
        self.wait_for(lambda: self.supervisors[name].poll() is not None, f"the end of {name}", patience_s)
        return self.supervisors[name].returncode

    def ends(self, *names: str, patience_s: float = PATIENCE_S) -> list[int]:
        return [self.end(name, patience_s) for name in names or self.names]

    def __enter__(self) -> "LocalRun":
        return self

    def __exit__(self, *what: object) -> None:
        for name, process in self.supervisors.items():
            if process.poll() is None:
                for pid in [*self.ranks_of(name), process.pid]:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                process.wait()
