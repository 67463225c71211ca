"""Who this process is among the ranks, and collectives that carry gradients.

Shape legend: B rows per rank, W ranks, G = B x W.
"""

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import ConfigError

# torch 2.13 renamed these two and warns at every call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


MEET_S = 600  # for all ranks of a job to come


class Waits:
    """For how long this process has waited in collectives: for ranks that come later, and for what is sent.

    With gloo the host waits, and all that wait is counted, DeepSpeed's collectives too. With NCCL the GPU's stream waits
    while the host goes on; there the collectives of `World` are counted.
    """

    def __init__(self) -> None:
        self.host_s = 0.0
        self.on_stream: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = (
            deque()
        )  # begin and end of each, not yet counted

    def count_host(self) -> None:
        """Count from now on. torch has no hook for it, but all its collectives end in `Work.wait`."""
        plain_wait = dist.Work.wait
        if hasattr(plain_wait, "__wrapped__"):
            return

        @functools.wraps(plain_wait)
        def counted_wait(work: dist.Work, *arguments: object) -> bool:
            begun_s = time.perf_counter()
            try:
                return plain_wait(work, *arguments)
            finally:
                self.host_s += time.perf_counter() - begun_s

        dist.Work.wait = counted_wait

    @contextlib.contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """The block is a collective on tensors of this device."""
        if device.type != "cuda":  # counted already
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.on_stream.append((begin, end))

    def take_stream_s(self) -> float:
        """Seconds that the GPU's stream has waited since the last call, as far as it has come."""
        taken_s = 0.0
        while self.on_stream and self.on_stream[0][1].query():
            begin, end = self.on_stream.popleft()
            taken_s += begin.elapsed_time(end) / 1000
        return taken_s


WAITS = Waits()  # of the process, as its process groups are


@dataclass(frozen=True)
class World:
    """One rank's view of the job. `World()` is a job of one process, where every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_group: dist.ProcessGroup | None = None  # gloo, for small facts that must not wait for the GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, ...] of every rank -> [G, ...] in rank order. The gradient flows back to the rank that owns each row."""
        return x if self.size == 1 else _AllGather.apply(x, self)

    def all_gather_padded(self, x: Tensor) -> Tensor:
        """[B,C] of every rank, C its own -> [G, greatest C], without gradient; rows are filled with their first entry."""
        if self.size == 1:
            return x
        width = torch.tensor([x.shape[1]])
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=self.host_group)
        missing = int(width) - x.shape[1]
        return self.all_gather(torch.cat([x, x[:, :1].expand(-1, missing)], dim=1))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, with gradient."""
        return x if self.size == 1 else _AllReduce.apply(x)

    def rotate(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of the rank before this one, whose own go to the rank after it; without gradient."""
        if self.size == 1:
            return list(tensors)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received = [torch.empty_like(x) for x in tensors]
        sends = [dist.P2POp(dist.isend, x.contiguous(), after) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, before) for x in received]
        with WAITS.counted(self.device):
            for work in dist.batch_isend_irecv([*sends, *receives]):
                work.wait()
        return received

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, without gradient: for metrics."""
        x = x.detach().clone()
        if self.size > 1:
            with WAITS.counted(x.device):
                dist.all_reduce(x)
        return x / self.size

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on some rank."""
        return self.add([flag])[0] > 0

    def add(self, values: list[float]) -> list[float]:
        """The sums over ranks of a few numbers of the host's."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums, group=self.host_group)
        return sums.tolist()

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's whole numbers, equally many each, in rank order."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.host_group)
        return [part.tolist() for part in gathered]

    def share(self, value: object) -> object:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather_objects(self, value: object) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.host_group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        gathered = x.new_empty((world.size * x.shape[0], *x.shape[1:]))
        with WAITS.counted(x.device):
            _all_gather(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Every rank used every row: a row's gradient is the sum of what all ranks say of it.
        own = grad.new_empty((grad.shape[0] // ctx.world.size, *grad.shape[1:]))
        with WAITS.counted(grad.device):
            _reduce_scatter(own, grad.contiguous())
        return own, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        with WAITS.counted(x.device):
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        with WAITS.counted(grad.device):
            dist.all_reduce(grad)
        return grad


def connect(patience_s: float = MEET_S) -> World:
    """Join the job that started this process: torchrun, deepspeed, srun, `--ranks N`, or nothing (one process).

    `patience_s` is how long a rank waits for the others in a collective before that fails. Raises ConfigError when the
    launcher gave only part of what is needed.
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank}: local rank {local_rank} has no GPU; this node shows {torch.cuda.device_count()}. "
                "Start one process a GPU and let every process see all GPUs of its node."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:  # DeepSpeed wants a process group even for one process; this one needs no network
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"rank {rank} of {size}: {' and '.join(missing)} not set. Start with torchrun, deepspeed, "
                "`--ranks N`, or `python -m launch submit`."
            )
        store = meet(rank, size)
        patience = timedelta(seconds=patience_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    WAITS.count_host()
    host_group = dist.new_group(backend="gloo", timeout=patience) if size > 1 and device.type == "cuda" else None
    return World(rank, size, local_rank, device, host_group)


def meet(rank: int, size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT through which ranks find each other: torchrun's, or one that rank 0 keeps.

    A launcher that has chosen the port by binding it hands rank 0 the listening socket as MASTER_LISTEN_FD: between
    choosing and listening no other program can take the port.
    """
    patience = timedelta(seconds=MEET_S)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", rank, size, timeout=patience))[0]
    descriptor = os.environ.pop("MASTER_LISTEN_FD", None) if rank == 0 else None  # not for this process's children
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0,
        timeout=patience,
        master_listen_fd=None if descriptor is None else int(descriptor),
    )


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone, or has not come for as long as one waits."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Timed out waiting")
    return any(sign in text for sign in signs)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
