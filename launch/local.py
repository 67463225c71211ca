"""This machine, or hosts reached by ssh: each node's supervisor as a process of its own, detached from the terminal.

The script that starts it is plain bash, `bash RUN/launch/NAME.sh NODE JOB`, and the same on all hosts. The run folder must be
visible to all under the same path.
"""

import os
import shlex
import signal
import subprocess
from pathlib import Path

from data_tools.errors import UserError
from launch.job import ResolvedJob
from launch.slurm import enter_container, quote_list, render_code, render_setup

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")
ANSWER_S = 20
# Of the environment of who submits, what reaches the hosts, as sbatch would bring all of it.
FORWARDED = ("NCCL_", "GLOO_", "UCX_", "FI_", "OFI_", "TORCH_", "OMP_", "HF_")

_RUN = r"""
exec "${in_container[@]}" "$python" -m launch agent "$launch/job.json" --nodes "$nodes" \
  --node "$node" --job "$job" </dev/null
"""


def render(job: ResolvedJob) -> str:
    """The script of a resolved job that becomes the supervisor of one node. Pure: values in, text out."""
    parts = [
        "#!/usr/bin/env bash",
        "# The supervisor of one node of a job: bash FILE NODE JOB. Written by `python -m launch`; see docs/launch.md.",
        "set -euo pipefail",
        "",
        "# From the job file.",
        f"run={shlex.quote(job.run)}",
        "launch=$run/launch",
        f"python={shlex.quote(job.python)}",
        f"nodes={shlex.quote(','.join(map(node_name, job.hosts)))}",
        f"in_container=({quote_list(enter_container(job))})",
        "",
        "node=$1 job=$2",
        f"cd -- {shlex.quote(job.working_directory)}",
        *render_setup(job),
        *render_code(job),
    ]
    return "\n".join(parts) + "\n" + _RUN


def node_name(host: str) -> str:
    """The node that ssh reaches under this name."""
    return host.rpartition("@")[2]


def start(job: ResolvedJob, script: Path, job_id: str) -> dict[str, str]:
    """Start the supervisors; returns host -> "PID.START", which no later process has. Raises UserError if one does not start;
    there is then none."""
    commands = {host: start_command(job, script, host, job_id) for host in job.hosts}
    started = {host: subprocess.Popen(enter_host(job, host, command), **_PIPES) for host, command in commands.items()}
    processes, problems = {}, []
    for host, process in started.items():
        try:
            printed, said = process.communicate(timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            problems.append(f"{host}: no answer in {ANSWER_S} s")
            continue
        identity = identify(printed)
        if process.returncode or not identity:
            problems.append(f"{host}: {(said.strip() or printed.strip() or 'did not start').splitlines()[-1]}")
        else:
            processes[host] = identity
    if problems:
        send_signal(job, processes, signal.SIGKILL)
        raise UserError("the job is not started: " + "; ".join(problems))
    return processes


_PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def start_command(job: ResolvedJob, script: Path, host: str, job_id: str) -> str:
    """A line of bash that starts a supervisor in a session of its own, and prints /proc/PID/stat of it."""
    name = node_name(host)
    log = shlex.quote(str(job.launch / "logs" / f"{name}.supervisor.log"))
    given = {key: text for key, text in os.environ.items() if key.startswith(FORWARDED) and job.kind == "ssh"}
    forwarded = "".join(f"{key}={shlex.quote(text)} " for key, text in given.items())
    return (
        f"{forwarded}setsid bash {shlex.quote(str(script))} {shlex.quote(name)} {job_id} >>{log} 2>&1 </dev/null & "
        f'read -r line </proc/$!/stat; echo "$line"'
    )


def enter_host(job: ResolvedJob, host: str, line: str) -> list[str]:
    """The words that run a line of bash on a host."""
    return ["bash", "-c", line] if job.kind == "local" else [*SSH, host, f"bash -c {shlex.quote(line)}"]


def identify(stat: str) -> str:
    """Of a line of /proc/PID/stat: "PID.START", START being the clock ticks at which the process began; "" of no such line
    and of a process that has ended."""
    pid, _, rest = stat.partition(" (")
    fields = rest.rpartition(") ")[2].split()
    return f"{pid.split()[-1]}.{fields[19]}" if pid.strip() and len(fields) > 19 and fields[0] not in "ZX" else ""


def find_alive(job: ResolvedJob, processes: dict[str, str]) -> dict[str, bool | None]:
    """Which supervisors still run; None: the host does not answer."""
    asked = {}
    for host, identity in processes.items():
        line = f"cat /proc/{identity.partition('.')[0]}/stat 2>/dev/null; exit 0"
        asked[host] = subprocess.Popen(enter_host(job, host, line), **_PIPES)
    alive: dict[str, bool | None] = {}
    for host, process in asked.items():
        try:
            printed, _ = process.communicate(timeout=ANSWER_S)
            alive[host] = None if process.returncode else identify(printed) == processes[host]
        except subprocess.TimeoutExpired:
            process.kill()
            alive[host] = None
    return alive


def send_signal(job: ResolvedJob, processes: dict[str, str], number: int) -> list[str]:
    """Send a signal to the supervisors that still run; returns the hosts that did not answer. SIGKILL ends their ranks too:
    these die with their supervisor."""
    silent = []
    for host, alive in find_alive(job, processes).items():
        if alive is None:
            silent.append(host)
        elif alive:
            line = f"kill -{int(number)} {processes[host].partition('.')[0]}"
            try:
                subprocess.run(enter_host(job, host, line), **_PIPES, timeout=ANSWER_S)
            except subprocess.TimeoutExpired:
                silent.append(host)
    return silent


def check_start(job: ResolvedJob) -> None:
    """Refuse what cannot be started here. Raises UserError."""
    if job.container and job.container.runtime == "pyxis":
        raise UserError(f"container.runtime: pyxis belongs to srun; with kind: {job.kind} use apptainer")
    if not os.path.isdir(job.working_directory):
        raise UserError(f"working_directory: {job.working_directory}: no such folder")
