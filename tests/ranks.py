"""Run a function on several real processes joined by gloo, and get every rank's result."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pretrain.world import World

TIMEOUT_S = 240


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """`[function(world, *arguments) of rank 0, of rank 1, ...]`. The function is importable; a failure raises here."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        environment = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "lo"}  # the server has that of its first call
        call = (ranks, os.path.join(folder, "rendezvous"), environment, queue, function, arguments)
        processes = [context.Process(target=be_rank, args=(rank, *call), daemon=True) for rank in range(ranks)]
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
