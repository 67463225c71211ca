"""What a run reports: JSONL, TensorBoard, and a line or bar on the console. Written by rank 0 only."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_tools.files import write_atomic
from pretrain.world import WAITS


class Metrics:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard, and shows progress, from step `first_step` to `steps`."""

    def __init__(self, run: str | Path, first_step: int, steps: int, enabled: bool):
        self.run, self.enabled, self.steps = run, enabled, steps
        self.started_s, self.first_step = time.perf_counter(), first_step
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = Path(run) / "metrics.jsonl"
        if path.exists():  # a killed run may have logged steps after its last checkpoint; they are about to come again
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if step_of(line) <= first_step]
            write_atomic(path, b"".join(kept))
        self.file = open(path, "a", buffering=1)
        self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def step_done(self) -> None:
        if self.enabled:
            self.bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` after `step` steps done."""
        if not self.enabled:
            return
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            error.filename = self.file.name
            raise
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        text = f"loss {values['loss/total']:.3f}, {values['rate/samples_per_s']:.1f} samples/s"
        if self.bar.disable:
            done = step - self.first_step
            left_s = (time.perf_counter() - self.started_s) / done * (self.steps - step)
            print(f"step {step}/{self.steps}: {text}, {tqdm.format_interval(left_s)} left", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(text)

    def go_back(self, step: int) -> "Metrics":
        """The metrics of a run that goes on from an earlier `step`: what was logged after it is forgotten."""
        self.close()
        return Metrics(self.run, step, self.steps, self.enabled)

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            self.file.close()
            self.board.close()


class Clock:
    """Where the time of this rank's steps goes, between one report and the next."""

    def __init__(self) -> None:
        self.last_s, self.waited_s = time.perf_counter(), WAITS.host_s
        self.restart()

    def restart(self) -> None:
        self.steps, self.total_s = 0, 0.0
        self.data_s = self.compute_s = self.wait_s = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the last call, and for how many of them the host has waited in collectives."""
        now_s, host_s = time.perf_counter(), WAITS.host_s
        passed_s, waited_s = now_s - self.last_s, host_s - self.waited_s
        self.last_s, self.waited_s = now_s, host_s
        return passed_s, waited_s

    def data_wanted(self) -> None:
        self.total_s += self.lap()[0]  # what is said and agreed between steps

    def data_ready(self) -> None:
        passed_s, waited_s = self.lap()
        self.total_s += passed_s
        self.data_s += passed_s - waited_s
        self.wait_s += waited_s

    def step_done(self) -> None:
        passed_s, waited_s = self.lap()
        waited_s += WAITS.take_stream_s()
        self.total_s += passed_s
        self.compute_s += passed_s - waited_s
        self.wait_s += waited_s
        self.steps += 1

    def leave_out(self) -> None:
        """What was done since the last call belongs to no step."""
        self.lap()

    def rates(self, global_batch: int) -> dict[str, float]:
        """Means since the last call: seconds a step, of which this rank waited for data, computed, and waited in
        collectives; and samples a second over all ranks."""
        names = ("data_s", "compute_s", "wait_s")
        rates = {f"time/{name}": getattr(self, name) / self.steps for name in names}
        step_s = self.total_s / self.steps
        self.restart()
        return {"time/step_s": step_s, **rates, "rate/samples_per_s": global_batch / step_s}


def step_of(line: bytes) -> float:
    """The step of a metrics line; infinite for one that a crash cut short, and for what is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, in order."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
