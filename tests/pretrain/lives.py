"""Lives of a run as real processes, cheap enough to be killed often."""

import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paths import TINY
from ranks import Command
from safetensors.torch import load_file

from pretrain.data.cache import ReaderClosed

PATIENCE_S = 120
KEYS = "keys-rank-{}.jsonl"


class LifeOfRun(Command):
    """`ranks` processes of `python -m pretrain ARGUMENTS`; `hook(run)` is called in each before, to break something."""

    def __init__(self, run: Path, arguments: list[str], ranks: int, hook: Callable[[Path], None] | None = None) -> None:
        super().__init__(arguments, ranks, run, functools.partial(begin_life, run, hook))

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self, grace_s: float = 1.0) -> list[int]:
        return super().wait(grace_s, PATIENCE_S)

    def stderr(self) -> str:
        return self.printed("stderr")


def begin_life(run: Path, hook: Callable[[Path], None] | None, rank: int) -> None:
    record_keys(run, rank)
    if hook:
        hook(run)


def record_keys(run: Path, rank: int) -> None:
    """Note the keys of each batch that is trained on: RUN.keys-rank-N.jsonl."""
    from pretrain import train

    compute = train.compute_gradients

    def compute_and_note(engine: Any, batch: Any, losses: Any, step: int, *others: Any) -> Any:
        with open(f"{run}.{KEYS.format(rank)}", "a") as file:
            file.write(json.dumps({"step": step + 1, "keys": batch.keys}) + "\n")
        return compute(engine, batch, losses, step, *others)

    train.compute_gradients = compute_and_note


def at_end_of_step(step: int, act: Callable[[Any], None]) -> None:
    """Call `act` in this rank when so many steps are done, and saved if that is their turn."""
    from pretrain.life import Life

    plain, acted = Life.wait_for, False

    def wait_for(life: Any, *others: Any, **named: Any) -> tuple[bool, bool]:
        nonlocal acted
        if life.watch.step == step and not acted:
            acted = True
            act(life)
        return plain(life, *others, **named)

    Life.wait_for = wait_for


def stall(rank: int, from_position: int) -> None:
    """On that rank, no sample from there on comes before its reader is closed."""
    from pretrain.data.supply import IndexedSupply

    read, close, closed = IndexedSupply.read, IndexedSupply.close, threading.Event()

    def read_or_wait(supply: Any, draw: Any, row: int, attempt: int) -> Any:
        if os.environ["RANK"] == str(rank) and draw.positions[row] >= from_position:
            closed.wait()
            raise ReaderClosed
        return read(supply, draw, row, attempt)

    def close_and_tell(supply: Any) -> None:
        closed.set()
        close(supply)

    IndexedSupply.read, IndexedSupply.close = read_or_wait, close_and_tell


def arguments(shards: Path, run: Path, *overrides: str) -> list[str]:
    return ["train", str(TINY), f"run={run}", f"data.path={shards / 'train'}", *overrides]


def copy_run(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    for path in run.parent.glob(f"{run.name}.keys-rank-*"):
        shutil.copy(path, target.parent / path.name.replace(run.name, target.name, 1))
    return target


def losses_of(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines}


def keys_of(run: Path) -> dict[int, list[str]]:
    """The global batch of each step, as it was trained on last, in the order of the places in the batch."""
    found: dict[int, dict[int, list[str]]] = {}
    for path in sorted(run.parent.glob(f"{run.name}.keys-rank-*")):
        rank = int(path.stem.rpartition("-")[2])
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], {})[rank] = record["keys"]
    return {step: [key for rank in sorted(parts) for key in parts[rank]] for step, parts in sorted(found.items())}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")


def events_of(run: Path, name: str) -> list[dict[str, Any]]:
    from pretrain.events import read_events

    return [event for event in read_events(run) if event["event"] == name]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same losses, keys and weights, bit for bit."""
    assert losses_of(run) == losses_of(expected)
    assert keys_of(run) == keys_of(expected)
    found, wanted = weights_of(run), weights_of(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
