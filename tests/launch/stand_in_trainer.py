"""What ranks run in the tests of faults: a trainer without a model, which keeps to what `pretrain train` promises its launcher.

stand_in_trainer.py RUN STEPS STEP_S [SAVE_EVERY]

Each step takes the next 24 keys, each rank its share; the sum of them goes through rank 0, as an all-reduce would, and makes a
loss that depends on all steps before. Rank 0 locks the run, writes metrics (with the keys of each step) and checkpoints that
appear by rename, goes on from the newest, and ends with done.json. SIGTERM on any rank, or RUN/STOP, is agreed: all save and
end with 85. A rank that loses another ends with 86. The last rank crashes at the step that RUN/crash_at names,
and gives no sign of life while RUN/mute is there.
"""

import fcntl
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path

BATCH = 24
CONNECT_S = 60
RUN, STEPS, STEP_S = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
SAVE_EVERY = int(sys.argv[4]) if len(sys.argv) > 4 else 5
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
state = {"step": 0, "phase": "start"}
asked = []


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def show_life() -> None:
    folder = RUN / "progress"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        while RANK == SIZE - 1 and (RUN / "mute").exists():
            time.sleep(0.25)
        facts = {"time": time.time(), "rank": RANK, "host": socket.gethostname(), "pid": os.getpid()}
        write(folder / f"rank-{RANK:05d}.json", facts | state)
        time.sleep(0.25)


def note(event: str, **facts: object) -> None:
    with open(RUN / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), "event": event, "step": state["step"], **facts}) + "\n")


class Group:
    """Rank 0 hears all and answers all."""

    def __init__(self) -> None:
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.others = []
        if RANK == 0:
            with socket.create_server(("", place[1]), backlog=64) as server:
                server.settimeout(CONNECT_S)
                came = [server.accept()[0].makefile("rwb") for _ in range(SIZE - 1)]
            by_rank = {receive(file): file for file in came}
            self.others = [by_rank[rank] for rank in range(1, SIZE)]
            return
        end = time.monotonic() + CONNECT_S
        while True:
            try:
                self.root = socket.create_connection(place, timeout=CONNECT_S)
                self.root.settimeout(None)
                self.root = self.root.makefile("rwb")
                send(self.root, RANK)
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def gather(self, value: object) -> list:
        """Everybody's value, on every rank."""
        if RANK != 0:
            send(self.root, value)
            return receive(self.root)
        values = [value, *map(receive, self.others)]
        for other in self.others:
            send(other, values)
        return values


def send(file, value: object) -> None:
    pickle.dump(value, file)
    file.flush()


def receive(file) -> object:
    try:
        return pickle.load(file)
    except EOFError:
        raise ConnectionResetError("another rank has gone") from None


def newest() -> tuple[int, int]:
    found = sorted((RUN / "checkpoints").glob("step_*/state.json"))
    if not found:
        return 0, 0
    saved = json.loads(found[-1].read_text())
    return saved["step"], saved["loss"]


class Lock:
    def __init__(self) -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(RUN / "run.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check(self) -> None:
        """A life that was thought dead may not write."""
        try:
            held = os.path.samestat(os.stat(RUN / "run.lock"), os.fstat(self.descriptor))
        except FileNotFoundError:
            held = False
        if not held:
            print("the run is another life's now", flush=True)
            os._exit(86)


def save(step: int, loss: int) -> None:
    began = time.monotonic()
    folder, temporary = RUN / "checkpoints" / f"step_{step:08d}", RUN / "checkpoints" / f"tmp_step_{step:08d}"
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / "state.json").write_text(json.dumps({"step": step, "loss": loss}))
    lock.check()
    if not folder.exists():
        os.rename(temporary, folder)
    note("save", stall_s=time.monotonic() - began)


def train(group: Group) -> int:
    step, loss = group.gather(newest())[0]
    state.update(step=step, phase="data")
    if RANK == 0:
        path = RUN / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step] if step else []
        path.write_text("".join(line + "\n" for line in kept))
        note("start", world_size=SIZE, restart=int(os.environ["PRETRAIN_RESTART"]))
    share = BATCH // SIZE
    while True:
        answers = group.gather((bool(asked) or (RUN / "STOP").exists(), None))
        if any(answer[0] for answer in answers):
            break
        keys = list(range(step * BATCH + RANK * share, step * BATCH + (RANK + 1) * share))
        everything = [key for part in group.gather(keys) for key in part]
        time.sleep(STEP_S)
        if RANK == SIZE - 1 and (RUN / "crash_at").exists() and step + 1 == int((RUN / "crash_at").read_text()):
            raise ValueError(f"step {step + 1} is one that this program cannot do")
        step += 1
        loss = (loss * 31 + sum(key * key for key in everything)) % 1_000_003
        state.update(step=step, phase="step")
        if RANK == 0:
            lock.check()
            with open(RUN / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "loss": loss, "keys": everything}) + "\n")
            if step % SAVE_EVERY == 0:
                save(step, loss)
        if step >= STEPS:
            break
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if RANK == 0:
        save(step, loss)
        (RUN / "STOP").unlink(missing_ok=True)
        if step >= STEPS:
            note("done")
            write(RUN / "done.json", {"step": step})
        else:
            note("stop", code=85)
    group.gather(None)
    return 0 if step >= STEPS else 85


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    print(f"rank {RANK} of {SIZE}, pid {os.getpid()}", flush=True)
    if RANK == 0:
        lock = Lock()
    threading.Thread(target=show_life, daemon=True).start()
    try:
        code = train(Group())
    except (ConnectionError, OSError) as error:
        print(f"RuntimeError: Connection closed by peer: {error}", flush=True)
        if RANK == 0:
            note("stop", code=1)
        time.sleep(30)  # as the trainer does, for the one that has something to tell
        code = 86
    os._exit(code)
