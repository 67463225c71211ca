"""The ranks of one node in one life: started as children of its supervisor, one log each, watched and ended.

A rank is a session of its own, so that all it starts ends with it; the kernel kills it should the supervisor die.
"""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FROZEN_S = 2.0  # a rank that is stopped for longer is called frozen; a debugger that looks stops it for less
LOGS = "logs"
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # looked up here: between fork and exec nothing may be loaded


def rank_log(folder: Path, rank: int) -> Path:
    return folder / LOGS / f"rank-{rank:05d}.log"


def life_header(life: int, node: str, rank: int) -> str:
    """The line with which each life begins in a rank's log."""
    return f"=== life {life} {node} rank {rank} {time.strftime('%Y-%m-%dT%H:%M:%S%z')} ===\n"


def log_tail(folder: Path, rank: int, life: int, most_bytes: int = 16_384) -> str:
    """The end of what a rank has said in this life."""
    try:
        with open(rank_log(folder, rank), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    _, header, rest = text.rpartition("=== life ")
    if not header:
        return text  # more than that since the life began
    number, _, rest = rest.partition(" ")
    return rest.partition("\n")[2] if number == str(life) else ""


@dataclass
class Rank:
    """One process. Neither exit code nor signal: it runs."""

    rank: int
    process: subprocess.Popen | None
    pidfd: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    ended_at: float | None = None  # unix seconds, when it was noticed
    stopped_s: float | None = None  # since when it is stopped (monotonic)

    @property
    def ended(self) -> bool:
        return self.ended_at is not None


@dataclass
class Ranks:
    """Those of a node. Use from one thread: the kernel takes the end of the thread that started a process for the end of
    its parent."""

    folder: Path
    node: str
    life: int = 0
    ranks: list[Rank] = field(default_factory=list)

    def start(
        self,
        life: int,
        command: list[str],
        places: list[dict[str, str]],
        directory: str | None,
        listener: int | None,
    ) -> None:
        """Start one process for each of `places`, which are the environments of the ranks."""
        self.life, self.ranks = life, []
        parent = os.getpid()
        for place in places:
            number = int(place["RANK"])
            fds = [listener] if listener is not None and number == 0 else []
            environment = {**os.environ, **place}
            if fds:
                environment["MASTER_LISTEN_FD"] = str(listener)
            path = rank_log(self.folder, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as log:
                log.write(life_header(life, self.node, number).encode())
                try:
                    process = subprocess.Popen(
                        command,
                        env=environment,
                        cwd=directory,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=fds,
                        preexec_fn=lambda: end_with_parent(parent),
                    )
                except OSError as error:  # told as a shell does
                    log.write(f"{error.filename or command[0]}: {error.strerror}\n".encode())
                    code = 127 if error.errno == errno.ENOENT else 126
                    self.ranks.append(Rank(number, None, exit_code=code, ended_at=time.time()))
                    continue
            self.ranks.append(Rank(number, process, open_pidfd(process.pid)))

    def descriptors(self) -> list[int]:
        """Those that become readable when a rank ends."""
        return [rank.pidfd for rank in self.ranks if rank.pidfd is not None]

    def poll(self) -> None:
        """Note who has ended, and who is stopped."""
        for rank in self.ranks:
            if rank.ended or rank.process is None:
                continue
            if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                stopped = process_state(rank.process.pid) == "T"
                rank.stopped_s = (rank.stopped_s or time.monotonic()) if stopped else None
                continue
            # What it started ends with it. Before it is collected, for until then nobody else can have its number.
            kill_group(rank.process.pid)
            code = rank.process.wait()
            rank.exit_code, rank.signal = (code, None) if code >= 0 else (None, -code)
            rank.ended_at = time.time()
            if rank.pidfd is not None:
                os.close(rank.pidfd)
                rank.pidfd = None

    def signal(self, number: int) -> None:
        for rank in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, number)

    def kill(self) -> None:
        """Kill all that still run, and what they have started. They are gone when `running` is empty after a `poll`."""
        for rank in self.running():
            kill_group(rank.process.pid)

    def running(self) -> list[Rank]:
        return [rank for rank in self.ranks if not rank.ended]

    def frozen(self) -> list[int]:
        now_s = time.monotonic()
        return [one.rank for one in self.running() if one.stopped_s is not None and now_s - one.stopped_s > FROZEN_S]

    def facts(self) -> dict[str, list[Any]]:
        """Of each rank: exit code, signal, when it ended; all None while it runs."""
        return {str(rank.rank): [rank.exit_code, rank.signal, rank.ended_at] for rank in self.ranks}


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its supervisor dies, so that no rank is left behind."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask
        os._exit(1)


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # a kernel before 5.3, or a container that does not let us: polling finds its end
        return None


def process_state(pid: int) -> str:
    """R, S, D, T, Z ... as in ps; "" for a process that has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        return ""


def rank_places(
    active: list[str], node: str, ranks_per_node: int, master: tuple[str, int], life: int, environment: dict[str, str]
) -> list[dict[str, str]]:
    """The environment of each rank of a node, over what its supervisor has: the same on all backends."""
    node_rank, size = active.index(node), len(active) * ranks_per_node
    places = []
    for local_rank in range(ranks_per_node):
        rank = node_rank * ranks_per_node + local_rank
        place = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": ranks_per_node,
            "NODE_RANK": node_rank,
            "MASTER_ADDR": master[0],
            "MASTER_PORT": master[1],
            "PRETRAIN_RESTART": life,
        }
        if (
            "SLURM_JOB_ID" in os.environ
        ):  # what srun says is the supervisor's place, and would mislead a command that asks
            place |= {"SLURM_PROCID": rank, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node_rank}
            place |= {"SLURM_NTASKS": size, "SLURM_NPROCS": size, "SLURM_STEP_NUM_TASKS": size}
        places.append({"PYTHONUNBUFFERED": "1"} | environment | {name: str(value) for name, value in place.items()})
    return places


def check_gpus(wanted: int, count: Callable[[], int | None]) -> str | None:
    """Why this node cannot run `wanted` ranks, one a GPU; None where it can, or where it has no GPUs at all.

    `count` counts the GPUs of the node by asking its driver; None without one.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = count() if shown is None else len([part for part in shown.split(",") if part.strip() not in ("", "-1")])
    if found is None or found >= wanted:
        return None
    what = f"{found} GPU{'s' * (found != 1)} visible"
    if shown is not None:
        what += f" (CUDA_VISIBLE_DEVICES={shown})"
    per_task = os.environ.get("SLURM_GPUS_PER_TASK")
    bind = os.environ.get("SLURM_GPU_BIND") or os.environ.get("SLURM_TRES_BIND")
    on_node = os.environ.get("SLURM_GPUS_ON_NODE")
    if per_task:
        why = f"--gpus-per-task={per_task} gives the one task of this node its share only: use --gpus-per-node"
    elif bind and bind != "none":
        why = f"--gpu-bind={bind} hides the others: leave it out, a rank picks its GPU by LOCAL_RANK"
    elif on_node and on_node.isdigit() and int(on_node) < wanted:
        why = f"Slurm has given this job {on_node} on this node: ask for --gpus-per-node={wanted}"
    elif shown is not None:
        why = "unset CUDA_VISIBLE_DEVICES, or set gpus_per_node to what it shows"
    else:
        why = "set gpus_per_node to what the node has, or look at nvidia-smi there"
    return f"{wanted} ranks need a GPU each, {what}; {why}"


def count_gpus() -> int | None:
    """GPUs that nvidia-smi lists; None where there is no such program, or it does not answer."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return sum(line.startswith("GPU ") for line in result.stdout.splitlines()) if result.returncode == 0 else None
