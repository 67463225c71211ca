"""`doctor link`: how fast the nodes of a group exchange data, pair by pair.

Started once on each node, with NODE_RANK, NNODES, MASTER_ADDR and MASTER_PORT as a launcher gives them. The pairs of a
round are disjoint (a round robin), so each node talks to one other at a time. Without GPUs a pair sends to each other over a
plain socket, which is what an all-reduce of two does and needs no torch; with GPUs it is an all-reduce by NCCL.
"""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from typing import Any

from data_tools.errors import UserError, first_line

MEET_S = 10.0  # for all nodes to arrive; those that do not are left out
PAIR_WAIT_S = 3.0  # for the partner of a round
CHUNK_BYTES = 2**18
BUFFER_BYTES = 2**20  # in the kernel: little enough to drain quickly through a slow cable
REDUCE_BYTES = 2**28
PINGS = 5
WINDOWS = 4


def pair_up(count: int, number: int) -> list[tuple[int, int]]:
    """The disjoint pairs of a round. Rounds 0 to count-2 (count-1 where it is odd) have each pair once."""
    even = count + count % 2
    turning = [1 + (place + number) % (even - 1) for place in range(even - 1)]
    circle = [0, *turning]
    pairs = [tuple(sorted((circle[place], circle[even - 1 - place]))) for place in range(even // 2)]
    return sorted(pair for pair in pairs if pair[1] < count)


def count_rounds(count: int) -> int:
    """Of a whole round robin."""
    return count + count % 2 - 1 if count > 1 else 0


def print_link(backend: str, rounds: int | None, seconds: float) -> int:
    """Take part, and print one JSON line: MB/s from each partner, and how far this clock is from that of node rank 0."""
    try:
        rank, count = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])
        master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, ValueError):
        raise UserError(
            "doctor link is one node of a group: set NODE_RANK, NNODES, MASTER_ADDR and MASTER_PORT, or use "
            "`python -m launch preflight`, which does"
        ) from None
    if backend == "auto":
        backend = "nccl" if has_gpus() else "sockets"
    rounds = count_rounds(count) if rounds is None else min(rounds, count_rounds(count))
    measure = measure_by_sockets if backend == "sockets" else measure_by_torch
    facts = measure(rank, count, master, rounds, seconds, backend)
    print(json.dumps({"host": socket.gethostname(), "rank": rank, "backend": backend, **facts}), flush=True)
    return 0


def has_gpus() -> bool:
    import importlib.metadata
    import shutil

    if shutil.which("nvidia-smi") is None or "+cpu" in importlib.metadata.version("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def partner_of(rank: int, count: int, number: int) -> int | None:
    return next((pair[pair[0] == rank] for pair in pair_up(count, number) if rank in pair), None)


def measure_by_sockets(
    rank: int, count: int, master: tuple[str, int], rounds: int, seconds: float, backend: str
) -> dict[str, Any]:
    with socket.create_server(("", 0), backlog=256) as server, contextlib.ExitStack() as held:
        port = server.getsockname()[1]
        if rank == 0:
            table, clock = (
                held.enter_context(serve_addresses(master[1], count, port)),
                {"offset_s": 0.0, "delay_s": 0.0},
            )
        else:
            table, clock = ask_addresses(master, rank, port)
        rates: dict[str, float | None] = {}
        early: dict[tuple[int, int], socket.socket] = {}
        for number in range(rounds):
            peer = partner_of(rank, count, number)
            if peer is None:
                continue
            rates[str(peer)] = None
            if peer in table:
                with contextlib.suppress(OSError):
                    with meet(rank, peer, number, table[peer], server, early) as connection:
                        rates[str(peer)] = round(exchange(connection, seconds) / 1e6, 2)
        for connection in early.values():
            connection.close()
    return {"mb_s": rates, **clock}


@contextlib.contextmanager
def serve_addresses(port: int, count: int, own_port: int):
    """Node rank 0's part: wait for the others, tell all where each one listens, and what the time is."""
    table: dict[int, tuple[str, int]] = {}
    lines: list[tuple[socket.socket, Any]] = []
    deadline_s = time.monotonic() + MEET_S
    with socket.create_server(("", port), backlog=256) as server:
        while len(table) < count - 1 and (left_s := deadline_s - time.monotonic()) > 0:
            server.settimeout(left_s)
            try:
                connection, (host, _) = server.accept()
                connection.settimeout(2)
                lines.append((connection, connection.makefile("rw")))
                rank, listens = json.loads(lines[-1][1].readline())
                own_host = connection.getsockname()[0]
                table[rank] = (host, listens)
            except (OSError, ValueError, TypeError):
                continue
    book = {**table, **({0: (own_host, own_port)} if table else {})}
    threads = [threading.Thread(target=tell_time, args=(*line, book), daemon=True) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:  # before the exchanges begin, which would delay the answers
        thread.join(timeout=5)
    try:
        yield table
    finally:
        for connection, _ in lines:
            connection.close()


def tell_time(connection: socket.socket, file: Any, book: dict[int, tuple[str, int]]) -> None:
    with contextlib.suppress(OSError, ValueError):
        file.write(json.dumps(book) + "\n")
        file.flush()
        for _ in range(PINGS):
            if not file.readline():
                return
            file.write(f"{time.time()}\n")
            file.flush()


def ask_addresses(master: tuple[str, int], rank: int, port: int) -> tuple[dict[int, tuple[str, int]], dict[str, float]]:
    """Everybody's address from node rank 0, and how much its clock is ahead of ours: of the quickest of some answers."""
    deadline_s = time.monotonic() + MEET_S
    while True:
        try:
            connection = socket.create_connection(master, timeout=2)
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise UserError(f"{master[0]}:{master[1]} cannot be reached: {error}") from None
            time.sleep(0.1)
    with connection:
        connection.settimeout(MEET_S + 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        file = connection.makefile("rw")
        try:
            file.write(json.dumps([rank, port]) + "\n")
            file.flush()
            table = {int(peer): tuple(address) for peer, address in json.loads(file.readline()).items()}
            answers = []
            for _ in range(PINGS):
                sent = time.time()
                file.write("\n")
                file.flush()
                told, got = float(file.readline()), time.time()
                answers.append((got - sent, told - (sent + got) / 2))
        except (OSError, ValueError) as error:
            raise UserError(f"{master[0]}:{master[1]} does not answer: {first_line(error)}") from None
    delay_s, offset_s = min(answers)
    return table, {"offset_s": round(offset_s, 6), "delay_s": round(delay_s, 6)}


def meet(
    rank: int,
    peer: int,
    number: int,
    address: tuple[str, int],
    server: socket.socket,
    early: dict[tuple[int, int], socket.socket],
) -> socket.socket:
    """The connection to the partner of a round: the lower rank calls the other. Raises OSError."""
    if rank < peer:
        connection = socket.create_connection(address, timeout=PAIR_WAIT_S)
        connection.sendall(struct.pack("!ii", rank, number))
    else:
        deadline_s = time.monotonic() + PAIR_WAIT_S
        while (peer, number) not in early:
            server.settimeout(max(0.01, deadline_s - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(1)
            caller = struct.unpack("!ii", connection.recv(8, socket.MSG_WAITALL))
            early[caller] = connection
        connection = early.pop((peer, number))
    connection.settimeout(PAIR_WAIT_S)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    # On closing, what is still to be sent is dropped: a slow cable is free for the next round.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(b"!")  # both are here
    connection.recv(1)
    return connection


def exchange(connection: socket.socket, seconds: float) -> float:
    """Send and receive at once; bytes received a second in the best part of the time, for other work disturbs."""
    end_s = time.monotonic() + seconds
    connection.settimeout(seconds)

    def send() -> None:
        data = bytes(CHUNK_BYTES)
        with contextlib.suppress(OSError):
            while time.monotonic() < end_s:
                connection.send(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    buffer, window_s, best = bytearray(CHUNK_BYTES), seconds / WINDOWS, 0.0
    with contextlib.suppress(OSError):
        while (started_s := time.monotonic()) < end_s - window_s / 2:
            received = 0
            while (now_s := time.monotonic()) < started_s + window_s:
                count = connection.recv_into(buffer)
                if not count:
                    raise ConnectionResetError
                received += count
            best = max(best, received / (now_s - started_s))
    thread.join(timeout=seconds)
    return best


def measure_by_torch(
    rank: int, count: int, master: tuple[str, int], rounds: int, seconds: float, backend: str
) -> dict[str, Any]:
    """All-reduces of two, by the library that training uses: one process group a pair, on the first GPU of each node."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    wait = timedelta(seconds=PAIR_WAIT_S + 20)  # the first use of NCCL takes some seconds
    store = dist.TCPStore(master[0], master[1], count, rank == 0, timeout=timedelta(seconds=2 * MEET_S))
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    size = REDUCE_BYTES if backend == "nccl" else CHUNK_BYTES * 16
    tensor = torch.zeros(size // 4, device=device)
    rates: dict[str, float | None] = {}
    for number in range(rounds):
        peer = partner_of(rank, count, number)
        if peer is None:
            continue
        rates[str(peer)] = None
        pair = tuple(sorted((rank, peer)))
        try:
            own_store = dist.PrefixStore(f"round {number} pair {pair}", store)
            kind = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
            group = kind(own_store, pair.index(rank), 2, wait)
            group.allreduce([tensor]).wait()
            taken_s, times = 0.0, 0
            while times < 3 or (times < 50 and taken_s < seconds):
                if backend == "nccl":
                    torch.cuda.synchronize()
                started_s = time.perf_counter()
                group.allreduce([tensor]).wait()
                if backend == "nccl":
                    torch.cuda.synchronize()
                taken_s, times = taken_s + time.perf_counter() - started_s, times + 1
                flag = torch.tensor([float(taken_s < seconds)], device=device)
                group.allreduce([flag]).wait()  # both stop at the same time
                if flag.item() < 2 and times >= 3:
                    break
            rates[str(peer)] = round(size * times / taken_s / 1e6, 2)
        except RuntimeError as error:
            print(f"rank {rank}: round {number}, with {peer}: {first_line(error)}", flush=True)
    store.set(f"done {rank}", "1")
    if rank == 0:  # it holds the store
        with contextlib.suppress(RuntimeError):
            store.wait([f"done {other}" for other in range(count)], wait)
    return {"mb_s": rates}
