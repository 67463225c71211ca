"""What the ranks of test jobs run: small programs in the place of the trainer.

rank_probe.py say FILE [word ...]    write argv and environment to FILE
rank_probe.py meet FILE              rank 0 listens on MASTER_ADDR:MASTER_PORT, all others report there; FILE has all
rank_probe.py fail                   the last rank exits with 7 while the others are busy and deaf to SIGTERM
rank_probe.py train                  works until SIGTERM, then saves, each rank in its own time, and exits with 85;
                                     after a restart there is nothing left to do
"""

import json
import os
import signal
import socket
import sys
import time

LIMIT_S = 60
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
         "PRETRAIN_RESTART", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "NCCL_PROBE")  # fmt: skip


def say(path: str, *words: str) -> int:
    if os.environ["RANK"] == "0":
        with open(path, "w") as file:
            json.dump({"words": words, "environment": dict(os.environ)}, file)
    return 0


def meet(path: str) -> int:
    facts = {name: os.environ.get(name) for name in NAMES}
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ["RANK"] != "0":
        with connect(place) as connection:
            connection.sendall(json.dumps(facts).encode())
        return 0
    everyone = [facts]
    with socket.create_server(place) as server:
        server.settimeout(LIMIT_S)
        while len(everyone) < int(os.environ["WORLD_SIZE"]):
            connection, _ = server.accept()
            with connection, connection.makefile() as file:
                everyone.append(json.load(file))
    with open(path, "w") as file:
        json.dump(sorted(everyone, key=lambda one: int(one["RANK"])), file)
    return 0


def connect(place: tuple[str, int]) -> socket.socket:
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            return socket.create_connection(place, timeout=LIMIT_S)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def fail() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        return 7
    time.sleep(LIMIT_S)
    return 0


def train() -> int:
    saved = f"saved-{os.environ['RANK']}"
    if os.path.exists(saved):
        print("resumed, finished", flush=True)
        return 0
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    print("ready", flush=True)
    end = time.monotonic() + LIMIT_S
    while not asked and time.monotonic() < end:
        time.sleep(0.05)
    if not asked:
        return 1
    time.sleep(0.3 * int(os.environ["RANK"]))
    with open(saved, "w"):
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm and the supervisor may both ask; the trainer does the same
    print("saved", flush=True)
    return 85


def port() -> int:
    if os.environ["RANK"] == "0":
        with socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit({"say": say, "meet": meet, "fail": fail, "train": train, "port": port}[sys.argv[1]](*sys.argv[2:]))
