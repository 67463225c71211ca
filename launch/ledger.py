"""Where the wall time of a run went, over all its jobs and lives, to the second.

queue       waiting for nodes
start       from a job's start to its first step: preflight, processes, restoring
productive  steps that count, and their data
checkpoint  training stood still for a save
lost        steps that had to be done again after a failure or rollback
detect      from a failure to its notice
restart     from its notice to the next step; also from the end of a life that was asked to end to the end of its job

The supervisors say when a life began to train and how it ended (RUN/launch/events.jsonl), the trainer what happened in between
(RUN/events.jsonl, booked by the rules of `pretrain.events`). The time between the end of a job that has no successor and the
next submission by hand belongs to nobody.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.events import read_launch_events
from pretrain.events import divide, read_events

KINDS = ("queue", "start", "productive", "checkpoint", "lost", "detect", "restart")


@dataclass(frozen=True)
class Span:
    """A stretch of time; `life` counts from 0 over all jobs, -1 before the first."""

    kind: str
    begin_s: float  # unix
    end_s: float
    life: int

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass
class Life:
    """What the events say of one life."""

    number: int  # from 0, over all jobs
    name: str  # as the events and logs call it
    job: str
    began_s: float
    nodes: list[str] = field(default_factory=list)
    trained_s: float | None = None
    first_step: int | None = None
    step: int | None = None  # at its end
    code: int | None = None
    faults: list[Mapping[str, Any]] = field(default_factory=list)
    verdict: Mapping[str, Any] | None = None
    repair: Mapping[str, Any] | None = None


@dataclass
class Ledger:
    """The book of a run."""

    spans: list[Span]
    lives: list[Life]
    jobs: list[str]
    ended: Mapping[str, Any] | None  # the last job_end, where nothing came after it

    @property
    def seconds(self) -> dict[str, float]:
        booked = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            booked[span.kind] += span.seconds
        return booked

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time in which steps were done that count, without waiting in the queue."""
        booked = self.seconds
        working = sum(booked.values()) - booked["queue"]
        return booked["productive"] / working if working else 1.0

    def causes(self) -> dict[str, dict[str, float]]:
        """By cause: how many lives it ended, and what that cost: steps done again, noticing, starting again."""
        costs: dict[int, float] = {}
        for span in self.spans:
            if span.kind in ("lost", "detect"):
                costs[span.life] = costs.get(span.life, 0.0) + span.seconds
            elif span.kind == "restart" and span.life >= 0:
                life = self.lives[span.life]
                first = [time_s for time_s in (life.trained_s, *(fault["time"] for fault in life.faults)) if time_s]
                # Until a life trains, it makes up for the one before.
                blamed = span.life if first and span.begin_s >= min(first) else span.life - 1
                costs[blamed] = costs.get(blamed, 0.0) + span.seconds
        found: dict[str, dict[str, float]] = {}
        for life in self.lives:
            cause = (life.verdict or {}).get("cause")
            if cause in (None, "finished", "stopped", "time_limit", "preemption") and not life.faults:
                continue
            entry = found.setdefault(cause or "not judged", {"failures": 0, "seconds": 0.0})
            entry["failures"] += 1
            entry["seconds"] += costs.get(life.number, 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))

    def nodes(self) -> Counter[str]:
        """How often each node was the one to fail first."""
        return Counter(
            life.verdict["node"] for life in self.lives if life.verdict and life.faults and life.verdict.get("node")
        )


def read_ledger(run: str | Path) -> Ledger:
    """Book a run from what lies in its folder, up to its last sign of life."""
    launched, trained = read_launch_events(run), read_events(run)
    return book_run(launched, trained, last_sign(Path(run), launched, trained))


def last_sign(run: Path, launched: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> float:
    """When anything of the run was heard of last."""
    times = [event["time"] for event in [*launched[-1:], *trained[-1:]]]
    if not (launched and launched[-1]["event"] == "job_end"):
        for name in ("launch/state.json", "progress/rank-00000.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                times.append(float(json.loads((run / name).read_text())["time"]))
    return max(times, default=0.0)


def book_run(launched: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]], now_s: float) -> Ledger:
    """Divide the time from the first event to `now_s`. Pure."""
    return _Booker(trained).book(launched, now_s)


class _Booker:
    """Goes through the supervisors' events; `at_s` is up to where the time is booked."""

    def __init__(self, trained: Sequence[Mapping[str, Any]]) -> None:
        self.trained = trained
        self.spans: list[Span] = []
        self.lives: list[Life] = []
        self.jobs: list[str] = []
        self.at_s = 0.0
        self.phase = "queue"  # what is going on: queue, start, restart, training, or nothing (None)

    def book(self, launched: Sequence[Mapping[str, Any]], now_s: float) -> Ledger:
        ended = None
        if launched:
            self.at_s = launched[0]["time"]
        for event in launched:
            name, time_s = event["event"], max(event["time"], self.at_s)
            ended = event if name == "job_end" else None if name in ("submitted", "job_start") else ended
            step = getattr(self, f"on_{name}", None)
            if step is not None:
                step(event, time_s)
        if self.phase == "training":
            self.train(max(now_s, self.at_s), whole=True)
        elif self.phase is not None:
            self.pass_time(self.phase, max(now_s, self.at_s))
        return Ledger(self.spans, self.lives, self.jobs, ended)

    def pass_time(self, kind: str, end_s: float) -> None:
        if end_s > self.at_s:
            self.spans.append(Span(kind, self.at_s, end_s, len(self.lives) - 1))
            self.at_s = end_s

    def train(self, end_s: float, whole: bool) -> None:
        """Book a life's training from its first step, by the trainer's own events; not `whole`: it was cut off."""
        inside = [dict(event) for event in self.trained if self.at_s <= event["time"] <= end_s]
        inside = [event for event in inside if event["event"] != "start"]
        if not whole and not any(event["event"] in ("stop", "done", "hang") for event in inside):
            inside.append({"time": end_s, "event": "stop", "code": None})
        for kind, _, until_s in divide([{"time": self.at_s, "event": "start"}, *inside], end_s):
            self.pass_time(kind, until_s)

    def break_off(self, time_s: float, happened_s: float | None) -> None:
        """A failure that was noticed at `time_s`."""
        if self.phase == "training":
            if happened_s is None:  # the next life tells when this one gave its last sign
                later = [event for event in self.trained if event["event"] == "start" and event["time"] > self.at_s]
                happened_s = (later[0].get("last_seen") if later else None) or time_s
            self.train(min(max(happened_s, self.at_s), time_s), whole=False)
        elif self.phase is not None and happened_s is not None:
            self.pass_time(self.phase, min(max(happened_s, self.at_s), time_s))
        if self.phase is not None:
            self.pass_time("detect" if happened_s is not None else self.phase, time_s)
            self.phase = "restart"

    def on_submitted(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.phase is None:
            self.at_s, self.phase = time_s, "queue"

    def on_job_start(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.phase is None:
            self.at_s = time_s
        elif self.phase == "training":  # the job before was ended without a word
            later = [other for other in self.trained if other["event"] == "start" and other["time"] > self.at_s]
            seen_s = (later[0].get("last_seen") if later else None) or self.at_s
            self.train(min(max(seen_s, self.at_s), time_s), whole=False)
            self.pass_time("queue", time_s)
        else:
            self.pass_time("queue" if self.phase == "queue" else "restart", time_s)
        self.phase = "start"
        self.jobs.append(str(event.get("job_id", event.get("job"))))

    def on_life_start(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.phase == "training":  # the life before has left no word of its end
            self.break_off(time_s, None)
        if self.phase is None:
            self.at_s, self.phase = time_s, "start"
        self.pass_time(self.phase, time_s)
        job = self.jobs[-1] if self.jobs else str(event.get("job"))
        number = len(self.lives)
        self.lives.append(Life(number, str(event.get("life", number)), job, time_s, list(event.get("nodes", []))))

    def on_training(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.phase in ("start", "restart"):
            self.pass_time(self.phase, time_s)
            self.phase = "training"
            if self.lives:
                self.lives[-1].trained_s, self.lives[-1].first_step = time_s, event.get("step")

    def on_fault(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.lives:
            self.lives[-1].faults.append(event)
        self.break_off(time_s, event.get("happened_s"))

    def on_life_end(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.lives:
            self.lives[-1].code, self.lives[-1].step = event.get("code"), event.get("step")
        if self.phase == "training":
            if event.get("code") in (0, 85):
                self.train(time_s, whole=True)
                self.phase = "restart"
            else:
                self.break_off(time_s, time_s)

    def on_verdict(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.lives:
            self.lives[-1].verdict = event

    def on_repair(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.lives:
            self.lives[-1].repair = event

    def on_job_end(self, event: Mapping[str, Any], time_s: float) -> None:
        if self.phase == "training":
            self.train(time_s, whole=event.get("code") in (0, 85))
        elif self.phase is not None:
            self.pass_time(self.phase, time_s)
        self.phase = "queue" if event.get("next") else None
        self.at_s = max(self.at_s, time_s)
