"""Run a function, or a command, on several real processes joined by gloo. They are forked from a server that has the
imports, which take more time than what most tests do."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.world import World

TIMEOUT_S = 240
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}

_context = multiprocessing.get_context("forkserver")


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """`[function(world, *arguments) of rank 0, of rank 1, ...]`. The function is importable; a failure raises here."""
    with tempfile.TemporaryDirectory() as folder:
        queue = _context.Queue()
        environment = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "lo"}  # the server has that of its first call
        call = (ranks, os.path.join(folder, "rendezvous"), environment, queue, function, arguments)
        processes = [_context.Process(target=be_rank, args=(rank, *call), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            results = {}
            while len(results) < ranks:
                rank, result, error = queue.get(timeout=TIMEOUT_S)
                if error:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                results[rank] = result
            return [results[rank] for rank in range(ranks)]
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()


def be_rank(
    rank: int,
    ranks: int,
    rendezvous: str,
    environment: dict[str, str],
    queue: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
        queue.put((rank, function(World(rank, ranks, rank), *arguments), None))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


class Command:
    """`python -m pretrain ARGUMENTS` as so many ranks, or as one process that is none. Each prints to PREFIX.stdout-RANK and
    PREFIX.stderr-RANK, and calls `before(rank)` first."""

    def __init__(
        self, arguments: list[str], ranks: int | None, prefix: Path, before: Callable[[int], None] | None = None
    ) -> None:
        self.prefix = prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        for rank in range(ranks or 1):
            environment = SETTINGS | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {})
            call = (rank, environment, prefix, arguments, before)
            self.processes.append(_context.Process(target=be_command, args=call))
            self.processes[-1].start()

    def wait(self, grace_s: float = 1.0, patience_s: float = TIMEOUT_S) -> list[int]:
        """Exit codes; as a launcher does, ends the others `grace_s` after the first that failed."""
        deadline_s, failed_s = time.monotonic() + patience_s, None
        while any(process.is_alive() for process in self.processes):
            now_s = time.monotonic()
            if failed_s is None and any(process.exitcode not in (None, 0) for process in self.processes):
                failed_s = now_s
            if now_s > deadline_s or (failed_s is not None and now_s > failed_s + grace_s):
                for process in self.processes:
                    process.kill()
            time.sleep(0.02)
        assert time.monotonic() < deadline_s, f"the ranks did not end by themselves: {self.printed('stderr')[-2000:]}"
        return [process.exitcode for process in self.processes]

    def printed(self, stream: str) -> str:
        """What all ranks printed to "stdout" or "stderr"."""
        paths = sorted(self.prefix.parent.glob(f"{self.prefix.name}.{stream}-*"))
        return "".join(path.read_text() for path in paths)


def be_command(
    rank: int, environment: dict[str, str], prefix: Path, arguments: list[str], before: Callable[[int], None] | None
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{prefix}.{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    os.environ.update(environment)
    torch.set_num_threads(1)
    from pretrain.__main__ import main

    if before:
        before(rank)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the server's other children have to stay
