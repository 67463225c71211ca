"""The one supervisor of a job that decides: which nodes run a life, when it is over, what repairs it, how the job ends.

It gives one order, which goes out with its beats: a description of how things should be, not a request to do something, so it
may be heard late, twice or in part by others than it was meant for. Of two orders the one with the greater (generation,
number) holds. A supervisor that takes over makes the next generation its own by a file that can be made only once; a leader
that cannot hear more than half of the nodes has to do so, too, before it decides anything.

    gather (and preflight) -> prepare -> run -> (save) -> collect -> repair -> prepare ... -> end
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from launch import ladder
from launch.events import append_event, read_launch_events, read_lines
from launch.heartbeat import ACCEPTS, REFUSES, Heart
from launch.job import ResolvedJob, choose_notice_s, read_save_stalls_s
from launch.judge import Evidence, RankEnd, Verdict, judge, recall_verdicts, remember_bad_node, verdict_facts
from launch.preflight import preflight
from launch.ranks import log_tail
from launch.shared import SIGN_S, Shared, replace
from launch.successor import continue_job

EXIT_SAVED, EXIT_RESTART = 85, 86
PREPARE_S = 20.0  # for a node to end the ranks of the life before
GRACE_S = 2.0  # for the other ranks to end by themselves, and say why, after one has failed
FINISH_S = 60.0  # the same after one has finished or saved
MEASURE_S = 60.0  # between two looks at how long saves take
MOST_LOGS = 128  # of the ranks that ended first, that are read to find the cause
RETURN_WAIT_S = 60.0  # for a node that is cut off to come back, where nothing else helps but a requeue
RETURN_S = 5.0  # for which a node has to answer again before it is used
END_S = 5.0  # for the other supervisors to end their ranks at the end of the job


def find_lost(heart: Heart, shared: Shared, node: str, silent_s: float) -> str | None:
    """What has become of a node that no longer beats; None for one that does.

    gone     its supervisor has ended, the node itself answers
    frozen   nothing runs there, but its kernel answers
    cut      it can be reached by nobody, but it can reach the run folder
    silent   neither: without power, or cut off from everything
    """
    silence_s, answer = heart.silence_s(node), heart.answer(node)
    if answer == REFUSES:
        return "gone"
    if silence_s < silent_s:
        return None
    if answer == ACCEPTS:
        return "frozen"
    sign = shared.look.signs.get(node)
    since_beat_s = silence_s - (time.monotonic() - sign[1]) if sign else 0.0
    return "cut" if since_beat_s > SIGN_S + 2 * shared.look_s else "silent"


def side(voters: int, alive: int) -> str:
    """Whether `alive` of `voters` nodes are "most", "half" or "few" of them."""
    return "most" if 2 * alive > voters else "half" if 2 * alive == voters else "few"


class Leader:
    """Made when a supervisor begins to lead; `tick` decides, `order` is the result, `code` the job's exit code at its end."""

    def __init__(
        self,
        job: ResolvedJob,
        allocation: list[str],
        node: str,
        generation: int,
        heart: Heart,
        shared: Shared,
        ask_why: Callable[[], str | None] = lambda: None,
        release: Callable[[], None] = lambda: None,
        end_time: float | None = None,
    ) -> None:
        self.job, self.allocation, self.node, self.generation = job, allocation, node, generation
        self.heart, self.shared, self.run, self.ask_why, self.release = heart, shared, shared.run, ask_why, release
        self.end_time = end_time  # of the allocation, unix seconds
        self.notice_s = float(job.save_before_end_s or 0)  # before that; measured anew
        self.measured_s = time.monotonic()
        self.number = 0
        self.phase, self.since_s = "gather", time.monotonic()
        self.action = "wait"
        self.members: list[str] = [node]  # nodes that answer, in the order in which they came
        self.active: list[str] = []
        self.lost: dict[str, str] = {}
        self.excluded: dict[str, str] = {}  # nodes not to be used in this job any more, and why
        self.returned_s: dict[str, float] = {}
        self.life, self.restarts = 0, 0
        self.started_at = 0.0  # of this life, unix seconds
        self.started_step = 0
        self.training = False
        self.master: list[Any] | None = None
        self.asked: str | None = None  # the notice that was acted on, or "grow"
        self.stop_file = False
        self.deadline_s = float("inf")
        self.ended_s: float | None = None  # when the first rank of this life ended well
        self.outage = False  # of the network between the nodes
        self.broken: Verdict | None = None  # why the last life has failed, and its exit code
        self.broken_code = 0
        self.frozen_rank: tuple[int, str, str] | None = None
        self.commands: dict[str, dict[str, Any]] = {}
        self.lock, self.changed = threading.Lock(), False  # of commands
        self.pending: Future | None = None
        self.then: Callable[[Any], None] = lambda result: None
        self.claim: Future | None = None
        self.own: dict[str, Any] = {}  # what this node's supervisor says
        self.why: Future | None = None  # what Slurm says of why it ends the job
        self.leads = True
        self.code: int | None = None
        self.ending: dict[str, Any] = {}
        self.order = self.make_order()

    # What is told.

    def make_order(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "number": self.number,
            "leader": self.node,
            "action": self.action,
            "life": self.life,
            "active": list(self.active),
            "members": list(self.members),
            "master": self.master,
            "commands": dict(self.commands),
            # For who takes over:
            "lost": dict(self.lost),
            "excluded": dict(self.excluded),
            "restarts": self.restarts,
            "started": [self.started_at, self.started_step],
            "asked": self.asked,
            "code": self.ending.get("code"),
        }

    def give_order(self, action: str | None = None) -> None:
        self.action = action or self.action
        self.number += 1
        self.order = self.make_order()

    def take_over(self, order: dict[str, Any], kind: str) -> None:
        """Go on from the order of a leader that is lost."""
        old = order["leader"]
        self.life, self.restarts, self.active = order["life"], order["restarts"], list(order["active"])
        self.members = [node for node in order["members"] if node != self.node]
        self.members.insert(0, self.node)
        self.members.sort(key=order["members"].index)
        self.lost, self.excluded = dict(order["lost"]), dict(order["excluded"])
        self.started_at, self.started_step = order["started"]
        self.asked, self.training, self.master = order["asked"], True, order["master"]
        self.action = order["action"]
        self.phase = {"run": "run", "save": "save", "prepare": "run"}.get(self.action, "gather")
        if self.action == "prepare":  # it never began to run
            self.enter("collect", 0.0)
        if order["action"] == "end":  # the old one was about to end the job: do that
            self.ending = {"code": order["code"]}
            self.phase = "end"
        if kind == "resigned":  # nobody is lost, but the ranks were ended when nobody led
            self.outage = True
            if self.phase in ("run", "save"):
                self.enter("collect", 0.0)
        elif old in self.members:
            self.lose(old, kind)
        self.give_order()

    def log(self, event: str, **facts: Any) -> None:
        """Put an event on record; the time is that of the call."""
        facts = {"time": time.time(), "job": self.shared.job, "life": self.life, **facts}
        self.shared.do(lambda: append_event(self.run, event, **facts))
        told = " ".join(f"{name}={value}" for name, value in facts.items() if name not in ("time", "job", "excerpt"))
        print(f"{time.strftime('%FT%T')} {event} {told}", flush=True)

    # The loop.

    def tick(self, own: dict[str, Any]) -> None:
        self.own = own
        if self.changed:
            self.changed = False
            self.give_order()
        if self.leads and self.phase != "end":
            self.watch_nodes()
        if not self.leads or self.code is not None:
            return
        if self.pending is not None:
            if self.pending.done():
                pending, self.pending = self.pending, None
                self.then(pending.result())
            return
        notice = self.find_notice()
        if notice and self.phase in ("gather", "run"):
            self.begin_save(notice)
        {
            "gather": self.gather,
            "prepare": self.prepare,
            "run": self.watch_life,
            "collect": self.collect,
            "repair": self.repair,
            "save": self.save,
            "end": self.end,
        }[self.phase]()

    def enter(self, phase: str, within_s: float = float("inf")) -> None:
        self.phase, self.since_s = phase, time.monotonic()
        self.deadline_s = self.since_s + within_s

    def wait_for(self, future: Future, then: Callable[[Any], None]) -> None:
        self.pending, self.then = future, then

    def in_thread(self, function: Callable[[], Any], otherwise: Any = None) -> Future:
        """Call what may take long, and not in the folder's thread. `otherwise` is the result if it fails: what is asked there
        is not worth the job."""
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except Exception:
                traceback.print_exc()
                future.set_result(otherwise)

        threading.Thread(target=work, daemon=True).start()
        return future

    def says(self, node: str) -> dict[str, Any]:
        return self.own if node == self.node else self.heart.last_said(node)

    def spares(self) -> list[str]:
        return [node for node in self.members if node not in self.active and node not in self.excluded]

    # Nodes.

    def watch_nodes(self) -> None:
        silent_s = self.job.node_silent_s
        self.shared.doubted = [
            node for node in self.members if node != self.node and self.heart.silence_s(node) > 2 * self.job.heartbeat_s
        ]
        silent = {}
        for node in self.members:
            if node != self.node and (kind := find_lost(self.heart, self.shared, node, silent_s)):
                silent[node] = kind
        if silent and self.may_decide(silent):
            for node, kind in silent.items():
                self.lose(node, kind)
        if not self.leads:
            return
        for node in set(self.allocation).difference(self.members):
            if self.heart.last_said(node) and self.heart.silence_s(node) < silent_s / 2:
                if self.heart.answer(node) != REFUSES:
                    self.welcome(node)

    def may_decide(self, silent: dict[str, str]) -> bool:
        """Whether this leader may go on without these nodes. With less than most of the nodes it may be the one that is cut
        off: then it has to win the next generation in the shared folder, or to stop."""
        voters = [node for node in self.members if silent.get(node) != "gone"]  # who is gone for certain has no voice
        alive = [node for node in voters if self.heart.silence_s(node) <= 2 * self.job.heartbeat_s]
        if self.claim is None:
            which = side(len(voters), len(alive))
            if which == "most":
                return True
            if any(node not in silent for node in voters if node not in alive):
                return False  # others have just fallen silent, too: it will show whether for long
            if which == "few" and any(kind == "cut" for kind in silent.values()):
                self.abdicate(f"{len(alive)} of {len(voters)} nodes can be heard here, and others live: they go on")
                return False
            self.claim = self.shared.do(self.shared.claim_generation, self.generation + 1)
        if not self.claim.done():
            return False
        claimed, self.claim = self.claim.result(), None
        if not claimed:
            self.abdicate("another node leads: it was faster when this one could not hear it")
            return False
        self.generation += 1
        self.give_order()
        return True

    def abdicate(self, why: str) -> None:
        print(f"{time.strftime('%FT%T')} no longer the leader: {why}", flush=True)
        self.leads = False

    def lose(self, node: str, kind: str) -> None:
        details = {
            "gone": "its supervisor has ended",
            "frozen": "its processes stand still, its kernel answers",
            "cut": "it can reach the run folder, but nobody can reach it",
            "silent": "it does not answer in any way",
        }
        told = {"gone": "exit"}.get(kind, kind)
        happened = time.time() - min(self.heart.silence_s(node), 3600.0)
        self.log("fault", kind=told, node=node, rank=None, detail=details[kind], happened_s=happened)
        self.members.remove(node)
        self.lost[node] = kind
        self.returned_s.pop(node, None)
        self.give_order()
        if node in self.active and self.phase in ("prepare", "run", "save"):
            self.enter("collect", 0.0)

    def welcome(self, node: str) -> None:
        if self.lost.pop(node, None):
            self.log("return", node=node)
        self.members.append(node)
        if self.phase == "gather":
            self.members.sort(key=self.allocation.index)
        self.returned_s[node] = time.monotonic()
        self.give_order()

    # The start of the job.

    def gather(self) -> None:
        """Wait for all supervisors, and what each has found out about its GPUs."""
        missing = [node for node in self.allocation if node not in self.members]
        unready = [node for node in self.members if not self.says(node).get("ready")]
        waited_s = time.monotonic() - self.since_s
        if (missing or unready) and waited_s < self.job.start_wait_s:
            return
        for node in missing:
            if node not in self.lost:
                self.lost[node] = "silent"
                detail = f"its supervisor did not appear within {waited_s:.0f} s"
                if node in self.shared.look.places:
                    detail = "its supervisor runs, but its beats (UDP datagrams) do not arrive: a firewall between the nodes?"
                self.log("fault", kind="silent", node=node, rank=None, detail=detail)
        refused = {node: says for node in self.members if (says := self.says(node).get("refused"))}
        self.log("job_start", nodes=self.members, spares=max(0, len(self.members) - self.job.nodes))
        for node, why in refused.items():
            self.log("fault", kind="exit", node=node, rank=None, detail=why)
        if len(refused) == len(self.members):
            node, why = next(iter(refused.items()))
            self.end_job(2, f"{node}: {why}", "stop")
            return
        self.excluded |= refused
        if self.job.preflight.enabled:
            self.give_order()
            began_s = time.monotonic()
            self.wait_for(self.in_thread(self.run_preflight, {}), lambda bad: self.preflighted(bad, began_s))
        else:
            self.plan_first_life()

    def run_preflight(self) -> dict[str, list[str]]:
        nodes = [node for node in self.members if node not in self.excluded]
        return preflight(self.run_on_nodes, nodes, self.job, self.job.preflight.timeout_s)

    def preflighted(self, bad: dict[str, list[str]], began_s: float) -> None:
        self.commands = {}
        self.log("preflight", seconds=round(time.monotonic() - began_s, 1), bad=bad)
        self.excluded |= {node: "; ".join(reasons) for node, reasons in bad.items()}
        self.plan_first_life()

    def run_on_nodes(self, nodes: list[str], command: list[str], timeout_s: float) -> dict[str, tuple[int | None, str]]:
        """Run a command once on each of these nodes, at once, and wait. From threads other than the supervisor's."""
        key = f"{threading.get_ident()}-{time.monotonic_ns()}"
        port = self.says(nodes[0]).get("free_port")
        place = self.says(nodes[0]).get("address")
        self.set_command(key, {"words": command, "nodes": nodes, "timeout_s": timeout_s, "master": [place, port]})
        end_s = time.monotonic() + timeout_s + 5
        found: dict[str, tuple[int | None, str]] = {}
        while time.monotonic() < end_s and len(found) < len(nodes):
            for node in nodes:
                result = self.says(node).get("results", {}).get(key)
                if result is not None:
                    found[node] = (result[0], result[1])
                elif node in self.lost:
                    found[node] = (None, f"the node is {self.lost[node]}")
            time.sleep(0.02)
        self.set_command(key, None)
        return {node: found.get(node, (None, "")) for node in nodes}

    def set_command(self, key: str, command: dict[str, Any] | None) -> None:
        """Have a command in the order, or no longer. From other threads: the next turn of the loop gives the order."""
        with self.lock:
            others = {name: value for name, value in self.commands.items() if name != key}
            self.commands = others | ({key: command} if command else {})
            self.changed = True
        self.heart.wake()

    def plan_first_life(self) -> None:
        self.active = self.allocation[: self.job.nodes]
        start = Verdict("unknown", None, "the job begins", "", "", None, 0, False)
        repair = self.choose(start)
        if repair.nodes:
            self.start_life(list(repair.nodes))
        else:
            self.end_job(EXIT_RESTART, repair.reason, "requeue")

    def choose(self, verdict: Verdict) -> ladder.Repair:
        bad = {*self.lost, *self.excluded}
        spares = [
            node for node in [*self.allocation, *self.members] if node in self.members and node not in self.active
        ]
        left = self.job.max_restarts - self.restarts if self.life else 1  # the first start is none
        repair = ladder.choose_repair(
            verdict, self.active, spares, bad, self.job.nodes, self.job.min_nodes, self.fits, left
        )
        return repair

    def fits(self, nodes: int) -> bool:
        return self.job.batch_size is None or self.job.batch_size % (nodes * self.job.gpus_per_node) == 0

    # A life.

    def start_life(self, nodes: list[str]) -> None:
        self.active, self.master, self.training, self.ended_s, self.frozen_rank = nodes, None, False, None, None

        def begin() -> tuple[int | None, int]:
            life = self.shared.claim_life(self.life + 1 if self.life else None, self.generation)
            return life, newest_step(self.run)

        self.wait_for(self.shared.do(begin), self.begin_life)

    def begin_life(self, begun: tuple[int | None, int]) -> None:
        life, step = begun
        if life is None:
            self.abdicate("another node has begun the next life")
            return
        self.life, self.started_step, self.started_at = life, step, time.time()
        self.enter("prepare", PREPARE_S)
        self.give_order("prepare")

    def prepare(self) -> None:
        """Until all nodes have ended what ran before, and the first has bound the port at which the ranks meet."""
        waiting = [
            node
            for node in self.active
            if self.says(node).get("life") != self.life or self.says(node).get("phase") != "prepared"
        ]
        if not waiting:
            first = self.says(self.active[0])
            self.master = [first["address"], first["port"]]
            self.enter("run")
            self.give_order("run")
            per_node = self.job.gpus_per_node
            ranks = {node: list(range(i * per_node, (i + 1) * per_node)) for i, node in enumerate(self.active)}
            size = len(self.active) * per_node
            self.log("life_start", nodes=self.active, world_size=size, ranks=ranks, step=self.started_step)
        elif time.monotonic() > self.deadline_s:
            for node in waiting:
                if node == self.node:
                    self.abdicate("the ranks of this node cannot be ended")
                    return
                self.excluded[node] = "its ranks could not be ended"
                self.log("fault", kind="frozen", node=node, rank=None, detail=self.excluded[node])
            self.enter("collect", 0.0)

    def rank_ends(self) -> dict[int, tuple[str, int, list[Any]]]:
        """Of each rank of this life: node, local rank, [exit code, signal, when it ended]."""
        found = {}
        for place, node in enumerate(self.active):
            says = self.says(node)
            facts = says.get("ranks", {}) if says.get("life") == self.life else {}
            for local in range(self.job.gpus_per_node):
                rank = place * self.job.gpus_per_node + local
                found[rank] = (node, local, facts.get(str(rank), [None, None, None]))
        return found

    def watch_life(self) -> None:
        ends = self.rank_ends()
        ended = {rank: end for rank, end in ends.items() if end[2][2] is not None}
        failed = {rank: end for rank, end in ended.items() if end[2][0] not in (0, EXIT_SAVED)}
        self.stop_file |= self.shared.look.stop_file
        if failed:
            rank, (node, _, (code, number, at)) = min(failed.items(), key=lambda one: one[1][2][2])
            how = f"exit code {code}" if number is None else f"signal {number}"
            self.log("fault", kind="exit", node=node, rank=rank, detail=how, happened_s=at)
            self.enter("collect", GRACE_S)
        elif len(ended) == len(ends):
            self.enter("collect", 0.0)
        elif ended:
            self.ended_s = self.ended_s or time.monotonic()
            if time.monotonic() - self.ended_s > FINISH_S:
                rank, (node, _, _) = next((rank, end) for rank, end in ends.items() if rank not in ended)
                detail = f"still runs {FINISH_S:.0f} s after others have finished"
                self.log("fault", kind="hang", node=node, rank=rank, detail=detail)
                self.frozen_rank = (rank, node, f"did not arrive: {detail}")
                self.enter("collect", 0.0)
        elif not self.find_frozen():
            self.watch_progress()
            self.watch_clock()
            self.consider_growing()

    def find_frozen(self) -> bool:
        for node in self.active:
            says = self.says(node)
            if says.get("life") != self.life:
                if time.monotonic() - self.since_s > 3.0 and node in self.members:
                    self.lose(node, "gone")  # its supervisor is another one than that which began this life
                    return True
                continue
            for rank, why in says.get("frozen", {}).items():
                kind = "frozen" if "stopped" in why else "silent"
                self.log("fault", kind=kind, node=node, rank=int(rank), detail=why)
                self.frozen_rank = (int(rank), node, f"does not answer: {why}")
                self.enter("collect", 0.0)
                return True
        return False

    def progress(self) -> dict[str, Any] | None:
        """Rank 0's last sign of life, if it is of this life: given since its supervisor has started it, by the same clock."""
        found, says = self.shared.look.progress.get(0), self.says(self.active[0]) if self.active else {}
        started = says.get("started") if says.get("life") == self.life else None
        return found if found and started and found.get("time", 0) >= started else None

    def step(self) -> int | None:
        found = self.progress()
        return None if found is None else found.get("step")

    def watch_progress(self) -> None:
        found = self.progress()
        if not self.training and found and found.get("step", 0) > self.started_step:
            self.training = True
            self.log("training", step=found["step"])

    def watch_clock(self) -> None:
        """Ask for the last save in time before the allocation ends, by what saves have taken so far."""
        if self.end_time is None or not self.job.save_before_end_s:
            return
        if time.monotonic() - self.measured_s > MEASURE_S:
            self.measured_s = time.monotonic()

            def measure() -> None:
                if stalls_s := read_save_stalls_s(self.run):
                    self.notice_s = choose_notice_s(self.job.time_limit_min, stalls_s)

            self.shared.do(measure)
        if time.time() > self.end_time - self.notice_s:
            self.begin_save("time_limit")

    def consider_growing(self) -> None:
        if len(self.active) >= self.job.nodes or not self.training:
            return
        now_s = time.monotonic()
        ready = [node for node in self.spares() if now_s - self.returned_s.get(node, 0.0) > RETURN_S]
        count = min(self.job.nodes, len(self.active) + len(ready))
        if any(self.fits(more) for more in range(len(self.active) + 1, count + 1)):
            self.begin_save("grow")

    # Being asked to end.

    def find_notice(self) -> str | None:
        """What somebody asks the job to do: by a signal to a supervisor, or by the file of the batch script."""
        notices = {says.get("notice") for node in self.members if (says := self.says(node))}
        notices |= {self.shared.look.notice}
        for kind in ("time_limit", "preemption", "cancel"):
            if kind in notices:
                return kind
        return None

    def begin_save(self, kind: str) -> None:
        self.asked = kind
        if kind == "grow":
            print(f"{time.strftime('%FT%T')} a node is back: saving, to go on with more nodes", flush=True)
        else:
            self.log("notice", kind=kind)
            if kind == "cancel":
                self.why = self.in_thread(self.ask_why)
        if self.phase == "gather":
            self.end_asked(EXIT_SAVED, f"{kind} before anything ran")
            return
        self.enter("save")
        self.give_order("save")

    def save(self) -> None:
        """Until all ranks have saved and ended."""
        ends = self.rank_ends()
        ended = [end for _, _, end in ends.values() if end[2] is not None]
        failed = [end for end in ended if end[0] not in (0, EXIT_SAVED)]
        if len(ended) == len(ends) or (failed and time.time() - min(end[2] for end in failed) > GRACE_S):
            self.enter("collect", 0.0)

    # The end of a life.

    def collect(self) -> None:
        ends = self.rank_ends()
        if all(end[2] is not None for _, _, end in ends.values()) or time.monotonic() > self.deadline_s:
            lost = {node: {"cut": "silent"}.get(kind, kind) for node, kind in self.lost.items() if node in self.active}
            if self.outage:
                lost = {node: "silent" for node in self.active if node != self.node}
                self.outage = False
            step, life, started_at, asked = self.step(), self.life, self.started_at, self.asked
            frozen, stop_file = self.frozen_rank, self.stop_file
            launch, run = self.shared.launch, self.run

            def find_evidence() -> tuple[Evidence, bool, list[Verdict]]:
                said = [event for path in sorted(run.glob("events*.jsonl")) for event in read_lines(path)]
                said = [event for event in said if event.get("time", 0) >= started_at]
                hangs = [event for event in said if event.get("event") == "hang"]
                # The sign of life is up to a second old; what the trainer says at its end is exact.
                ends_said = [event["step"] for event in said if event.get("event") in ("stop", "done", "hang")]
                reached = ends_said[0] if ends_said else step
                if frozen:
                    hangs.append({"event": "hang", "rank": frozen[0], "host": frozen[1], "reason": frozen[2]})
                first = sorted(ends, key=lambda rank: ends[rank][2][2] or float("inf"))[:MOST_LOGS]
                tails = {rank: log_tail(launch, rank, life) for rank in first}
                ranks = tuple(
                    RankEnd(rank, node, local, code, number, at, tails.get(rank, ""))
                    for rank, (node, local, (code, number, at)) in ends.items()
                )
                notice = (
                    asked if asked in ("time_limit", "preemption", "cancel") else "stop_file" if stop_file else None
                )
                evidence = Evidence(
                    life, started_at, time.time(), reached, ranks, lost, hangs[-1] if hangs else None, notice,
                    saved_step=newest_step(run),
                )  # fmt: skip
                return evidence, (run / "done.json").exists(), recall_verdicts(read_launch_events(run))

            self.wait_for(self.shared.do(find_evidence), self.judge_life)

    def judge_life(self, found: tuple[Evidence, bool, list[Verdict]]) -> None:
        evidence, done, history = found
        codes = [end.exit_code for end in evidence.ranks]
        if self.asked == "grow" and not evidence.lost_nodes and set(codes) == {EXIT_SAVED}:
            self.log("life_end", code=EXIT_SAVED, step=evidence.step)
            self.asked = None
            nodes = [*self.active, *self.spares()][: self.job.nodes]
            while not self.fits(len(nodes)):
                nodes.pop()
            self.log("repair", action="grow", nodes=nodes)
            self.start_life(nodes)
            return
        if self.asked == "grow":
            self.asked = None  # it broke before it had saved: then that is what has to be repaired
        verdict = judge(evidence, history, self.job.max_lives_same_failure)
        code = 0 if verdict.cause == "finished" else first_code(evidence, verdict)
        self.log("life_end", code=code, step=evidence.step)
        self.log("verdict", **{name: value for name, value in verdict_facts(verdict).items() if name != "life"})
        if verdict.exclude and verdict.node:
            self.excluded[verdict.node] = verdict.reason
            self.remember(verdict)
        if verdict.cause == "finished":
            if done or self.job.config is None:
                self.end_job(0, verdict.reason, None)
            else:
                self.end_job(1, f"all ranks ended with 0, but {self.run}/done.json is not there", "stop")
            return
        self.asked = self.asked or self.find_notice()  # it may have come after the life had broken
        hopeless = verdict.stop and verdict.cause in ("code", "data", "user")
        if (self.asked or evidence.notice or verdict.cause == "stopped") and not hopeless:
            saved = set(codes) <= {0, EXIT_SAVED}
            self.end_asked(EXIT_SAVED if saved else EXIT_RESTART, verdict.reason)
            return
        self.broken, self.broken_code = verdict, code
        self.enter("repair", RETURN_WAIT_S)

    def repair(self) -> None:
        """Choose what follows a life that has failed. Before the allocation is given back, a node that lives and is only cut off
        has some time to be heard again: a requeue takes longer."""
        verdict, code = self.broken, self.broken_code
        repair = self.choose(verdict)
        if repair.action == "requeue" and "cut" in self.lost.values() and time.monotonic() < self.deadline_s:
            if (notice := self.find_notice()) is None:
                return
            self.asked = notice
            self.end_asked(EXIT_RESTART, verdict.reason)
            return
        if repair.nodes:
            told = {"spare": repair.spare} if repair.spare else {}
            self.log("repair", action=repair.action, nodes=list(repair.nodes), excluded=list(repair.excluded), **told)
            self.restarts += 1
            self.start_life(list(repair.nodes))
        else:
            self.end_job(code if repair.action == "stop" else EXIT_RESTART, repair.reason, repair.action)

    def end_asked(self, code: int, reason: str) -> None:
        """End the job as somebody has asked; what follows depends on who."""

        def decide(why: str | None) -> None:
            kind = why or self.asked or "stop_file"
            following = {"time_limit": "resubmit", "preemption": "requeue"}.get(kind, "stop")
            self.end_job(code, reason, following, kind)

        if self.asked == "cancel":
            self.why = self.why or self.in_thread(self.ask_why)
            self.wait_for(self.why, decide)
        else:
            decide(None)

    def remember(self, verdict: Verdict) -> None:
        self.shared.do(remember_bad_node, self.job.bad_nodes, verdict.node, str(self.run), verdict.reason)

    # The end of the job.

    def end_job(self, code: int, reason: str, following: str | None, kind: str | None = None) -> None:
        """Nothing is to run any more. `following`: None, stop, requeue or resubmit."""
        self.ending = {"code": code}
        if following:
            bad = sorted({*self.lost, *self.excluded})
            self.log("repair", action=following, nodes=[], excluded=bad, reason=reason)
        following = following if following in ("requeue", "resubmit") else None
        self.log("job_end", code=code, reason=reason, next=following)
        self.shared.do(self.shared.write_end, code)
        self.enter("end", END_S)
        if following:  # this may end this very process: all is on record
            written = self.shared.do(lambda: None)
            self.wait_for(self.in_thread(lambda: self.ask_for_more(written, kind or following)), self.continued)
        else:
            self.give_order("end")

    def ask_for_more(self, written: Future, reason: str) -> str | None:
        """May take minutes, and end this process."""
        written.result(timeout=30)
        return continue_job(self.job, reason, sorted({*self.lost, *self.excluded}))

    def continued(self, how: str | None) -> None:
        print(f"{time.strftime('%FT%T')} continued by: {how}", flush=True)
        self.enter("end", END_S)
        self.give_order("end")

    def end(self) -> None:
        """Until the other supervisors have ended their ranks."""
        if self.action != "end":
            self.give_order("end")
        running = [node for node in self.members if node != self.node and self.says(node).get("phase") != "ended"]
        if running and time.monotonic() < self.deadline_s:
            return
        if self.allocation[0] in self.members:
            self.code = self.ending["code"]
        else:  # the batch script has died with its node, so nobody else gives the other nodes back
            self.wait_for(self.in_thread(self.release), lambda nothing: setattr(self, "code", self.ending["code"]))

    # For people.

    def write_state(self) -> None:
        """RUN/launch/state.json: how things stand. In the folder's thread."""
        now_s = time.time()
        nodes = {}
        for node in [*self.members, *self.lost]:
            says = self.says(node)
            state = self.lost.get(node) or ("active" if node in self.active else "spare")
            if node in self.excluded:
                state = "excluded"
            age_s = self.heart.silence_s(node)
            nodes[node] = {
                "state": state,
                "ranks": sorted(map(int, says.get("ranks", {}))) if says.get("life") == self.life else [],
                "beat_age_s": round(age_s, 1) if age_s < 1e6 else None,
            }
        state = {
            "time": now_s,
            "job": self.shared.job,
            "life": self.life,
            "phase": "ended" if self.code is not None else self.phase,
            "leader": self.node,
            "nodes": nodes,
            "spares": self.spares(),
            "step": self.step(),
            "code": self.code,
        }
        replace(self.shared.launch / "state.json", json.dumps(state, indent=1) + "\n")


def first_code(evidence: Evidence, verdict: Verdict) -> int:
    """The exit code of the first rank to fail, as a shell would give it."""
    failed = [end for end in evidence.ranks if end.ended_at is not None and end.exit_code != 0]
    if evidence.lost_nodes or not failed:
        return EXIT_RESTART
    first = min(failed, key=lambda end: end.ended_at)
    return first.exit_code if first.exit_code is not None else 128 + (first.signal or 0)


def newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit()), default=0)
