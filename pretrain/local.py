"""`--ranks N`: run this same command as N local processes, and end with them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

GRACE_S = 20  # for the others to end by themselves after one rank has failed
USER_ERROR = 2  # the exit code of a mistake that one rank has told, and that all share


def run_ranks(arguments: list[str], ranks: int) -> int:
    """Start `python -m pretrain ARGUMENTS` once a rank, pass on SIGINT, SIGTERM and SIGUSR1, and return the exit code.

    That is the code of the first rank that failed; the others are then ended. The parent keeps the rendezvous store (as
    torchrun's agent does), so its port is bound once and cannot collide.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours: no rank starts one
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for rank in range(ranks):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "pretrain", *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # so that a Ctrl-C reaches the ranks once, through us
                preexec_fn=end_with_parent,
            )
        )
    try:
        return wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies, so that no rank is left behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all; after the first failure, end the others."""
    failed_s, code = None, 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        codes = [process.returncode for process in processes if process.returncode]
        if codes and failed_s is None:
            failed_s, code = time.monotonic(), codes[0]
        if failed_s is not None and time.monotonic() - failed_s > (1 if code == USER_ERROR else GRACE_S):
            for process in processes:
                process.kill()
    codes = [process.returncode for process in processes if process.returncode]
    code = code or next(iter(codes), 0)
    return code if code >= 0 else 128 - code
