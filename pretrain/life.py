"""One life of a run, from the start of its processes to their end: what it is asked, what it decides, what it leaves on record.

The run folder is the run's memory over its lives: run.lock, events.jsonl, left_out.json, progress/, stacks/, STOP, SAVE and
done.json belong to this file and to those it uses; docs/resilience.md describes them.
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from data_tools.errors import UserError
from data_tools.files import write_json_atomic
from pretrain.checkpoint import Found, Saved, Saver, find_newest, set_aside
from pretrain.contract import Batch
from pretrain.data.loader import Batches
from pretrain.engine import gradient_norm
from pretrain.events import Events, RunLock, RunTaken, book, read_events
from pretrain.signals import EXIT_GIVE_UP, EXIT_SAVED, SAVE, STOP, StopRequest, answered, asked
from pretrain.spikes import GiveUp, LeftOut, Spikes, SpikesConfig
from pretrain.watch import Watch, WatchConfig
from pretrain.world import World

log = logging.getLogger(__name__)

DONE = "done.json"
REPORT = "report.json"
LEDGER = "ledger.json"
MOST_KEYS = 1024  # of one step, named in an event


class Life:
    """Made by every rank when it holds the run folder; only rank 0 writes, but for the watch."""

    def __init__(
        self, run: str | Path, watch: WatchConfig, spikes: SpikesConfig | None, world: World, lock: RunLock
    ) -> None:
        self.run, self.world, self.lock = Path(run), world, lock
        self.last_seen = self.read_last_seen()
        self.stop = StopRequest()
        self.events = Events(run)
        self.left_out = world.share(LeftOut(run) if world.is_main else None)
        self.spikes = Spikes(spikes) if spikes else None
        self.saves_as_asked = False
        self.watch = Watch(run, watch, world, lock, self.stop.insisted)
        self.watch.start()

    def read_last_seen(self) -> float | None:
        """When the life before gave its last sign, in unix seconds."""
        try:
            return float(json.loads((self.run / "progress" / "rank-00000.json").read_text())["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, event: str, step: int, **facts: Any) -> None:
        if self.world.is_main:
            self.lock.check()
            self.events.log(event, step, **facts)

    def start(self, step: int, steps: int, found: Found | None) -> None:
        """The engine stands at `step`, restored from `found`; training begins. Collective."""
        if self.world.is_main:
            if step < steps:
                (self.run / DONE).unlink(missing_ok=True)  # of a shorter duration
        self.pass_over(found)
        restart = int(os.environ.get("PRETRAIN_RESTART", 0))
        facts = {"steps": steps, "world_size": self.world.size, "restart": restart, "last_seen": self.last_seen}
        self.note("start", step, **facts)

    def pass_over(self, found: Found | None) -> None:
        """Set the damaged checkpoints aside because of which an older one was taken."""
        for folder, problem in found.passed_over if found else []:
            if self.world.is_main:
                set_aside(folder)
            self.note(
                "fallback", found.state["step"], **{"from": folder.name, "to": found.folder.name, "reason": problem}
            )

    def wait_for(self, batches: Batches, is_saved: bool) -> tuple[bool, bool]:
        """Wait until every rank has its next batch, or somebody asks to stop, or to save what no checkpoint has: which of
        these two it is. Collective; the only sum over the ranks that each step takes for this. Raises RunTaken."""

        def ask() -> list[bool]:
            files = self.world.is_main
            if files:
                self.lock.check()
            stop = self.stop.requested or (files and asked(self.run, STOP))
            return [stop, files and not is_saved and not self.saves_as_asked and asked(self.run, SAVE)]

        stop, save = batches.agree(ask)
        return stop, save

    def judge(self, step: int, loss: Tensor, engine: Any) -> str:
        """Why the gradients of this step are out of proportion, or "". `loss` [] is this rank's. Collective with spikes."""
        if self.spikes is None:
            return ""
        mean = self.world.add([loss.item()])[0] / self.world.size
        return self.spikes.judge(step, {"loss": mean, "norm": gradient_norm(engine)})

    def rollback_target(self, saver: Saver) -> Found | None:
        """The checkpoint to go back to after a spike; None if the step is only to be skipped. Collective."""
        if self.spikes.config.action != "rollback":
            return None
        self.watch.enter("restore", self.watch.step)  # it may take much longer than a step
        saver.finish()
        return find_newest(self.run, self.world)

    def skip(self, step: int, reason: str, keys: list[str]) -> None:
        """Note that a step changed nothing, `keys` being its samples or those to blame."""
        self.note("skip", step, keys=keys, reason=reason)

    def roll_back(self, step: int, found: Found, reason: str, batch: Batch) -> None:
        """Put on record which steps are left out before going back to `found`. Collective. Raises GiveUp."""
        self.pass_over(found)
        keys = all_keys(batch, self.world)
        steps = list(range(max(found.state["step"], step - self.spikes.config.leave_out_steps) + 1, step + 1))
        entry = {"steps": steps, "spike": step, "to": found.state["step"], "reason": reason, "keys": keys}
        self.left_out.add(entry, self.spikes.config.max_rollbacks, write=self.world.is_main)
        self.note(
            "rollback", step, **{"from": step, "to": found.state["step"], "left_out": steps}, reason=reason, keys=keys
        )
        if self.world.is_main:
            log.warning("step %d: %s; back to step %d, leaving out steps %s", step, reason, found.state["step"], steps)

    def begin_save(self) -> None:
        """What asks for a save from now on asks for the next one; what did before is answered when this one is whole."""
        self.saves_as_asked = self.world.is_main and asked(self.run, SAVE)

    def saved(self, saved: Saved) -> None:
        """Note that a checkpoint is whole."""
        if self.saves_as_asked:
            answered(self.run, SAVE)
            self.saves_as_asked = False
        self.note("save", saved.step, stall_s=saved.stall_s, bytes=saved.bytes, folder=saved.folder.name)

    def end(self, step: int, steps: int) -> int:
        """Everything is saved. Returns the exit code."""
        self.stop.ignore()
        code = 0 if step >= steps else EXIT_SAVED
        if self.world.is_main:
            answered(self.run, STOP, SAVE)
            ledger = book(read_events(self.run), time.time())
            if code == 0:
                self.note("done", step, goodput=ledger["goodput"])
                write_json_atomic(self.run / DONE, {"step": step, "steps": steps, "time": time.time()})
            else:
                self.note("stop", step, reason="asked", code=code, goodput=ledger["goodput"])
                log.info("stopped as asked after step %d of %d. Run the same command again to go on", step, steps)
            self.write_ledger()
        self.world.barrier()  # nobody leaves before it is on record
        return code

    def give_up(self, error: GiveUp) -> int:
        """The end of a run which a restart does not help: a report, and the exit code."""
        if self.world.is_main:
            log.error("error: %s", error)
            with contextlib.suppress(OSError, RunTaken):  # a disk that is full, too, does not change that
                self.note("stop", self.watch.step, reason=str(error), code=EXIT_GIVE_UP)
                report = {
                    "reason": str(error),
                    "left_out": self.left_out.entries,
                    "events": read_events(self.run)[-20:],
                }
                write_json_atomic(self.run / REPORT, report)
        return EXIT_GIVE_UP

    def fail(self, error: BaseException) -> None:
        """Note an end that nobody has asked for."""
        code = 2 if isinstance(error, UserError) else 1
        with contextlib.suppress(OSError, RunTaken):  # the error itself is what is to be told
            self.note("stop", self.watch.step, reason=f"{type(error).__name__}: {error}".splitlines()[0], code=code)

    def write_ledger(self) -> None:
        """Where the wall time of the run went so far: RUN/ledger.json."""
        write_json_atomic(self.run / LEDGER, book(read_events(self.run), time.time()))

    def close(self) -> None:
        self.watch.close()
        self.stop.close()


def all_keys(batch: Batch, world: World) -> list[str]:
    """The sample keys of a global batch, in order; the last entry counts those beyond MOST_KEYS. Collective."""
    keys = [key for part in world.gather_objects(batch.keys) for key in part]
    return keys[:MOST_KEYS] + [f"and {len(keys) - MOST_KEYS} more"] * (len(keys) > MOST_KEYS)
