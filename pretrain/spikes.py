"""Losses and gradients out of all proportion: what counts as a spike, and which batches are left out because of one.

Step and place in the data stay locked together: step k always takes the k-th global batch. A step that is skipped or left
out draws its batch, changes nothing, and counts. So a run with a left-out batch is the run in which that batch never was.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Literal

import pydantic
from typing_extensions import TypedDict

from data_tools.errors import UserError
from data_tools.files import write_json_atomic
from pretrain.config import ConfigModel, Count, Ratio

LEFT_OUT = "left_out.json"
NORMAL = 1.4826  # the median absolute deviation of a normal distribution is its standard deviation over this


class SpikesConfig(ConfigModel):
    """When a step is out of proportion, and what is done then. What is not finite is always skipped."""

    action: Literal["skip", "rollback"] = "skip"  # rollback: to the newest checkpoint, leaving out `leave_out_steps`
    threshold: Ratio = 10.0  # deviations (robust) above the median of the last `window_steps`, of loss or gradient norm
    window_steps: Count = 100
    warmup_steps: Count = 100  # of the run, in which nothing is a spike; and as many values must be known
    leave_out_steps: Count = 1  # at a rollback: the step of the spike and those right before it
    max_rollbacks: Count = 3  # to the same checkpoint, before the run gives up


class GiveUp(UserError):
    """A restart cannot help: the run ends with EXIT_GIVE_UP, and its text says what was tried."""


class Spikes:
    """Judges each step by the losses and gradient norms of those before it. The same values give the same verdicts."""

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.known: dict[str, deque[float]] = {name: deque(maxlen=config.window_steps) for name in ("loss", "norm")}

    def judge(self, step: int, values: dict[str, float]) -> str:
        """Why this step (from 0) is a spike; "" for one that is not, whose values are then known to the next.

        `values`: `loss` and `norm`, means over the global batch, so every rank judges alike.
        """
        for name, value in values.items():
            known = self.known[name]
            if not math.isfinite(value):
                return ""  # the engine applies no such gradients
            if step < self.config.warmup_steps or len(known) < min(self.config.warmup_steps, self.config.window_steps):
                continue
            limit = robust_limit(list(known), self.config.threshold)
            if value > limit:
                return f"{name} {value:.4g} is above {limit:.4g}, {self.config.threshold:g} deviations over the median"
        for name, value in values.items():
            self.known[name].append(value)
        return ""

    def state(self) -> dict[str, list[float]]:
        return {name: list(known) for name, known in self.known.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        for name, known in self.known.items():
            known.clear()
            known.extend(state.get(name, []))


def robust_limit(known: list[float], threshold: float) -> float:
    """Median + threshold x deviation. The deviation is at least a thousandth of the median, for values that hardly vary."""
    median = statistics.median(known)
    deviation = NORMAL * statistics.median(abs(value - median) for value in known)
    return median + threshold * max(deviation, abs(median) / 1000)


class LeftOutEntry(TypedDict):
    steps: list[int]
    spike: int  # the step because of which
    to: int  # step of the checkpoint to which the run went back
    reason: str
    keys: list[str]  # of the spike's batch


class LeftOut:
    """The steps that are left out, on record in RUN/left_out.json, so that every later life leaves them out too."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / LEFT_OUT
        try:
            found = json.loads(self.path.read_text()) if self.path.exists() else []
            self.entries = pydantic.TypeAdapter(list[LeftOutEntry]).validate_python(found)
        except ValueError as error:  # pydantic's is one, too
            reason = str(error)
            if isinstance(error, pydantic.ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
            raise UserError(
                f"{self.path}: not the record of steps that are left out: {reason}. Restore or remove it"
            ) from None
        self.steps = {step for entry in self.entries for step in entry["steps"]}

    def recall(self, entries: list[LeftOutEntry], write: bool) -> None:
        """Take over what a checkpoint has on record, where the run folder is a new one and the checkpoint came from elsewhere."""
        missing = [entry for entry in entries if entry not in self.entries]
        if missing:
            self.entries += missing
            self.steps.update(step for entry in missing for step in entry["steps"])
            if write:
                write_json_atomic(self.path, self.entries)

    def add(self, entry: LeftOutEntry, limit: int, write: bool) -> None:
        """Put a rollback on record. Raises GiveUp when `limit` have led to the same checkpoint before."""
        before = [other for other in self.entries if other["to"] == entry["to"]]
        if len(before) >= limit:
            story = "; ".join(f"step {other['spike']}: {other['reason']}" for other in [*before, entry])
            raise GiveUp(
                f"{limit} rollbacks to the checkpoint of step {entry['to']} have not got the run on ({story}). {self.path} "
                "names the samples. Lower engine.lr, or go on from an older checkpoint: remove the newer ones"
            )
        self.entries.append(entry)
        self.steps.update(entry["steps"])
        if write:
            write_json_atomic(self.path, self.entries)
