"""The supervisor of one node: `python -m launch agent RUN/launch/job.json`, started once on each node of a job.

It starts its node's ranks, watches them, beats to the supervisors of the other nodes (heartbeat.py) and carries out the order of
the one that leads (leader.py). Any of them can lead. It waits for nobody: not for srun, not for Slurm's controller, not for a
node that is gone; and for the run folder only in a thread (shared.py).

What it needs of its environment
    Slurm: SLURM_JOB_ID, SLURM_JOB_NODELIST, SLURMD_NODENAME, and SLURM_RESTART_COUNT where the job was queued again.
    Anywhere else: --nodes a,b,c --node a, each NAME or NAME=ADDRESS, and --job NAME, new for each start of the job.
    The first `nodes` of them run ranks, the others are spares.

How it is started on Slurm, from a batch script with #SBATCH --no-kill
    srun --no-kill --kill-on-bad-exit=0 --overlap --nodes=N --ntasks=N --ntasks-per-node=1 --output=none \\
        python -m launch agent RUN/launch/job.json
    srun waits for tasks on nodes that are gone, so the script must not wait for srun alone: the job has ended when srun has,
    or when RUN/launch/jobs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}/end is there. That file holds the job's exit code.
    To ask for the last save, the script writes a word (time_limit, preemption or cancel) into the file `notice` of that
    folder, or sends SIGUSR1 to srun, which hands it on; a SIGTERM that Slurm sends to all tasks is understood, too.

Exit codes, the same on every node that lives at the end: 0 the run is done (its done.json is there); 85 asked to stop, and
saved; 86 nodes are missing: to be queued again; else that of the first rank to fail. When the first node dies, the batch script
dies with it: the leader then ends or continues the job itself, through launch.successor, and the run folder tells the code.
"""

import contextlib
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from data_tools.errors import UserError
from launch import slurm
from launch.heartbeat import Heart, load_secret
from launch.job import ResolvedJob, read_job
from launch.leader import Leader, find_lost, side
from launch.ranks import LOGS, Ranks, check_gpus, count_gpus, rank_places
from launch.shared import Shared

POLL_S = 0.1
STUCK_S = 10.0  # for killed ranks to go
CANDIDATES = 5  # nodes that hear of all others, and so can take over
ALL_TO_ALL = 16  # up to so many nodes, everybody hears of everybody
TAKE_OVER_S = 0.3  # by which a node that hears only half waits for the old leader to claim its own succession
LONELY_S = 1800.0  # without a leader, after which a supervisor ends
RELEASE_TRIES, RELEASE_PAUSE_S = 8, 5.0
OUTPUT_BYTES = 16_384  # of a command on a node, that go into its answer


class Agent:
    """`supervise` is its whole life."""

    def __init__(
        self, path: Path, job: ResolvedJob, nodes: list[str], node: str, key: str, addresses: dict[str, str]
    ) -> None:
        self.path, self.job, self.nodes, self.node, self.key = path, job, nodes, node, key
        self.addresses = addresses
        launch = path.parent
        self.shared = Shared(launch.parent, key, node, len(nodes))
        (launch / LOGS).mkdir(exist_ok=True)
        self.woken, self.waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self.waker, False)
        self.heart = Heart(node, key, load_secret(launch), job.heartbeat_s, self.wake)
        self.address = find_address(node, nodes, addresses)
        self.ranks = Ranks(launch, node)
        self.order: dict[str, Any] | None = None
        self.leader: Leader | None = None
        self.phase, self.life = "idle", 0
        self.started = 0.0  # when this life's ranks were, unix seconds
        self.listener: socket.socket | None = None
        self.notice: str | None = None
        self.saved_life = 0  # whose ranks were told to save
        self.since_s = time.monotonic()
        self.end_time = guess_end_time(job)
        self.killed_s: float | None = None
        self.claim: Any = None
        self.claimed_generation = 0
        self.doubt_s: float | None = None  # since when the leader is missed
        self.beaten_s: float | None = None  # when another node was faster to succeed it
        self.leader_heard_s = time.monotonic()
        self.gpus: threading.Thread | None = None
        self.refused: str | None = None
        self.ready = False
        self.free_port = find_free_port()
        self.results: dict[str, list[Any]] = {}
        self.commands: set[str] = set()
        self.signs: dict[int, tuple[Any, float]] = {}

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self.waker, b".")

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        kind = "time_limit" if number == signal.SIGUSR1 else "cancel"
        if self.notice in (None, "cancel"):
            self.notice = kind
        self.wake()

    # The loop.

    def supervise(self) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.note_signal)
        self.shared.start()
        place = {"address": self.address, "port": self.heart.port, "pid": os.getpid(), "host": socket.gethostname()}
        self.shared.do(self.shared.publish, place)
        self.gpus = threading.Thread(target=self.look_at_gpus, daemon=True)
        self.gpus.start()
        self.heart.start()
        told(
            f"supervisor of {self.node} at {self.address}:{self.heart.port}, job {self.key}, nodes {' '.join(self.nodes)}"
        )
        try:
            while True:
                code = self.turn()
                if code is not None:
                    break
                ready = select.select([self.woken, *self.ranks.descriptors()], [], [], POLL_S)[0]
                if self.woken in ready:
                    os.read(self.woken, 4096)
        finally:
            self.ranks.kill()
            self.heart.close()
        self.shared.close(timeout_s=10)
        told(f"ended with {code}")
        return code

    def turn(self) -> int | None:
        """Look at everything once, and do what is due. Returns the exit code when it is time to go."""
        self.ranks.poll()
        look = self.shared.look
        self.heart.meet({node: (place["address"], place["port"]) for node, place in look.places.items()})
        self.hear_orders()
        if self.leader is not None:
            if self.shared.look.generation > self.leader.generation and self.leader.claim is None:
                self.leader.abdicate("the shared folder says that another node leads")
            self.leader.tick(self.describe())
            if not self.leader.leads:
                self.leader, self.shared.regular, self.shared.leading = None, None, False
                self.end_life("this node leads no more")
            else:
                self.order = self.leader.order
        else:
            self.succeed()
        self.follow()
        self.heart.say(self.describe(), self.targets())
        return self.find_end()

    def find_end(self) -> int | None:
        if self.leader is not None:
            return self.leader.code
        if self.phase == "ended":
            return self.order["code"]
        look_s = time.monotonic() - self.leader_heard_s
        if self.shared.look.end is not None and look_s > 2 * self.job.node_silent_s:
            return self.shared.look.end  # it has ended without us
        if look_s > LONELY_S:
            told("nobody leads any more")
            return 86
        return None

    # Orders.

    def hear_orders(self) -> None:
        """Take the newest order of those that came with beats; step down for a leader of a later generation."""
        for says in self.heart.heard().values():
            order = says.get("order")
            if order is None:
                continue
            place = (order["generation"], order["number"])
            own = self.leader.order if self.leader else self.order
            if own is None or place > (own["generation"], own["number"]):
                if self.leader is not None:
                    if order["generation"] <= self.leader.generation:
                        continue
                    told(f"{order['leader']} leads now")
                    self.leader, self.shared.regular, self.shared.leading = None, None, False
                self.order = order
        if self.order and self.heart.silence_s(self.order["leader"]) < self.job.node_silent_s:
            self.leader_heard_s = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """What this supervisor says with each beat."""
        facts = {
            "generation": self.order["generation"] if self.order else 0,
            "phase": self.phase,
            "life": self.life,
            "started": self.started,
            "address": self.address,
            "free_port": self.free_port,
            "ready": self.ready,
            "ranks": self.ranks.facts() if self.ranks.life == self.life and self.life else {},
            "frozen": self.find_frozen(),
        }
        if self.listener is not None:
            facts["port"] = self.listener.getsockname()[1]
        if self.leader is None and self.doubt_s is not None:
            facts["misses"] = self.order["leader"]
        for name in ("notice", "refused"):
            if getattr(self, name):
                facts[name] = getattr(self, name)
        if self.results:
            facts["results"] = dict(self.results)
        if self.leader is not None:
            facts["order"] = self.leader.order
        return facts

    def targets(self) -> tuple[str, ...]:
        if self.leader is not None or len(self.nodes) <= ALL_TO_ALL:
            return tuple(self.nodes)
        if self.order is None:
            return tuple(self.nodes[:CANDIDATES])
        return tuple({self.order["leader"], *self.order["members"][:CANDIDATES]})

    def follow(self) -> None:
        """Bring this node to what the order says."""
        order = self.order
        if order is None:
            return
        action, life = order["action"], order["life"]
        if self.leader is None and time.monotonic() - self.leader_heard_s > 2 * self.job.node_silent_s:
            if self.ranks.running():
                self.end_life("no leader can be heard")
            return
        if action == "end":
            if self.phase != "ended" and self.end_ranks():
                self.phase = "ended"
        elif action == "wait" or self.node not in order["active"]:
            if self.end_ranks() and self.phase != "idle":
                self.phase, self.life = "idle", 0
        elif action == "prepare":
            self.prepare(order)
        elif self.life == life and self.phase == "prepared":
            self.start_ranks(order)
        if action == "save" and self.life == life and self.saved_life != life:
            self.saved_life = life
            told("asking the ranks to save")
            self.ranks.signal(signal.SIGTERM)
        self.run_commands(order.get("commands", {}))

    def prepare(self, order: dict[str, Any]) -> None:
        if self.life == order["life"] and self.phase == "prepared":
            return
        if not self.end_ranks():
            return
        if order["active"][0] == self.node:
            self.close_listener()
            self.listener = socket.create_server(("", 0), backlog=4096)
        self.life, self.phase = order["life"], "prepared"

    def end_ranks(self) -> bool:
        """Kill what runs here; whether all of it is gone."""
        if not self.ranks.running():
            self.killed_s = None
            return True
        if self.killed_s is None:
            self.killed_s = time.monotonic()
        self.ranks.kill()
        if time.monotonic() - self.killed_s > STUCK_S and self.phase != "stuck":
            told(f"killed ranks do not go: {[rank.rank for rank in self.ranks.running()]}")
            self.phase = "stuck"
        return False

    def end_life(self, why: str) -> None:
        told(f"ending the ranks of life {self.life}: {why}")
        self.ranks.kill()
        self.close_listener()
        self.phase, self.life = "idle", 0

    def close_listener(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def start_ranks(self, order: dict[str, Any]) -> None:
        job, active = self.job, order["active"]
        environment = dict(job.environment)
        if "GLOO_SOCKET_IFNAME" not in os.environ and order["master"][0] == "127.0.0.1":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        places = rank_places(active, self.node, job.gpus_per_node, tuple(order["master"]), order["life"], environment)
        hand_over = self.listener is not None and job.config is not None
        if self.listener is not None and not hand_over:
            self.close_listener()  # a command of somebody else's binds the port itself
        self.phase, self.signs, self.started = "running", {}, time.time()
        numbers = [int(place["RANK"]) for place in places]
        self.shared.ranks = numbers
        told(
            f"life {order['life']}: ranks {numbers[0]} to {numbers[-1]}, meeting at {order['master'][0]}:{order['master'][1]}"
        )
        descriptor = self.listener.fileno() if hand_over else None
        self.ranks.start(order["life"], job.words, places, job.working_directory, descriptor)
        self.close_listener()  # rank 0 has it now

    def find_frozen(self) -> dict[str, str]:
        """Ranks of this node that are stopped, or whose signs of life have ceased, and how it shows."""
        found = {str(rank): "its process is stopped (SIGSTOP)" for rank in self.ranks.frozen()}
        now_s = time.monotonic()
        for one in self.ranks.running():
            sign = self.shared.look.progress.get(one.rank)
            if sign is None or sign.get("pid") != one.process.pid:
                continue  # it has not begun, or its command gives none
            if self.signs.get(one.rank, (None, 0.0))[0] != sign:
                self.signs[one.rank] = (sign, now_s)
            elif now_s - self.signs[one.rank][1] > self.job.rank_silent_s and str(one.rank) not in found:
                found[str(one.rank)] = f"no sign of life for {self.job.rank_silent_s:.0f} s"
        return found

    # Commands of the preflight.

    def run_commands(self, commands: dict[str, dict[str, Any]]) -> None:
        for key, command in commands.items():
            if key not in self.commands and self.node in command["nodes"]:
                self.commands.add(key)
                threading.Thread(target=self.run_command, args=(key, command), daemon=True).start()
        for key in list(self.results):
            if key not in commands:
                del self.results[key]

    def run_command(self, key: str, command: dict[str, Any]) -> None:
        nodes, (address, port) = command["nodes"], command["master"]
        place = {"NODE_RANK": nodes.index(self.node), "NNODES": len(nodes), "MASTER_ADDR": address, "MASTER_PORT": port}
        environment = {**os.environ, **self.job.environment, **{name: str(value) for name, value in place.items()}}
        if address == "127.0.0.1":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        code, output = None, b""
        try:
            process = subprocess.Popen(
                command["words"], env=environment, cwd=self.job.working_directory, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            try:
                output, _ = process.communicate(timeout=command["timeout_s"])
                code = process.returncode
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        except OSError as error:
            code, output = 127, str(error).encode()
        self.free_port = find_free_port()
        self.results[key] = [code, output[-OUTPUT_BYTES:].decode(errors="replace")]
        self.wake()

    def look_at_gpus(self) -> None:
        self.refused = check_gpus(self.job.gpus_per_node, count_gpus)
        self.ready = True
        self.wake()

    # Who leads.

    def succeed(self) -> None:
        """Lead, if it is this node's turn: the first node at the start, and the first that lives when the leader is lost."""
        order = self.order
        if order is not None and order["action"] == "end":
            return
        if self.claim is not None:
            if not self.claim.done():
                return
            claimed, self.claim = self.claim.result(), None
            if claimed:
                self.lead()
            else:
                self.beaten_s = time.monotonic()
            return
        now_s = time.monotonic()
        if order is None:
            heard = self.heart.heard()
            first = next(node for node in self.nodes if node == self.node or node in heard)
            waited_s = now_s - self.since_s
            if self.node != self.nodes[0] and not (first == self.node and waited_s > self.job.start_wait_s):
                return
            self.doubt_s = None
        else:
            silent_s = self.job.node_silent_s
            kind = self.find_lost_leader(order["leader"])
            members = order["members"]
            late_s = 2 * self.job.heartbeat_s
            self.shared.doubted = [node for node in members if self.heart.silence_s(node) > late_s]
            if kind is None or self.node not in members:
                self.doubt_s = None
                return
            self.doubt_s = self.doubt_s or now_s
            states = {node: find_lost(self.heart, self.shared, node, silent_s) for node in members}
            voters = [node for node in members if states[node] != "gone"]
            alive = [node for node in voters if states[node] is None and self.misses(node, order)]
            if alive[0] != self.node:
                return
            which = side(len(voters), len(alive))
            if which != "most" and kind == "cut":
                return  # it lives, and decides by the folder
            if which == "half" and now_s - self.doubt_s < TAKE_OVER_S:
                return
            if which == "few":  # the others may go on without this node: see whether they live at all
                living = any(states[node] in (None, "cut") for node in voters if node not in alive)
                if living or now_s - self.doubt_s < 2 * silent_s:
                    return
            if self.beaten_s is not None and now_s - self.beaten_s < 2 * silent_s:
                return
        known = order["generation"] if order else 0
        generation = max(known, self.claimed_generation, self.shared.look.generation if self.doubt_long() else 0) + 1
        self.claimed_generation = generation
        self.claim = self.shared.do(self.shared.claim_generation, generation)

    def find_lost_leader(self, leader: str) -> str | None:
        """What has become of the leader: as of any node, or "resigned" where it lives but leads no more, as after an outage of the
        network in which it heard nobody."""
        if leader == self.node:
            return "resigned"
        kind = find_lost(self.heart, self.shared, leader, self.job.node_silent_s)
        return "resigned" if kind is None and "order" not in self.heart.last_said(leader) else kind

    def misses(self, node: str, order: dict[str, Any]) -> bool:
        """Whether a node says that it does not hear the leader either."""
        return node == self.node or self.heart.last_said(node).get("misses") == order["leader"]

    def doubt_long(self) -> bool:
        """Whether who claimed the succession before has had time to make itself heard."""
        return self.doubt_s is None or time.monotonic() - self.doubt_s > 2 * self.job.node_silent_s

    def lead(self) -> None:
        told(f"{self.node} leads (generation {self.claimed_generation})")
        leader = Leader(
            self.job, self.nodes, self.node, self.claimed_generation, self.heart, self.shared,
            ask_slurm_why, release_allocation, self.end_time,
        )  # fmt: skip
        threading.Thread(
            target=lambda: setattr(leader, "end_time", ask_slurm_end() or self.end_time), daemon=True
        ).start()
        if self.order is not None:
            kind = self.find_lost_leader(self.order["leader"]) or "silent"
            leader.own = self.describe()
            leader.take_over(self.order, kind)
        self.leader, self.order = leader, leader.order
        self.shared.regular, self.shared.leading = leader.write_state, True


def told(text: str) -> None:
    print(f"{time.strftime('%FT%T')} {text}", flush=True)


# What a supervisor finds out about where it is.


def expand_nodes(text: str) -> list[str]:
    """The names in a list of hosts as Slurm writes it: "gpu[01-03,7],login" -> gpu01 gpu02 gpu03 gpu7 login."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = []
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            if fixed:
                pieces.append([fixed])
                continue
            numbers = []
            for one in ranges.split(","):
                low, _, high = one.partition("-")
                numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
            pieces.append(numbers)
        names += ["".join(parts) for parts in product(*pieces)]
    return names


def find_address(node: str, nodes: list[str], addresses: dict[str, str]) -> str:
    """Where the other nodes reach this one."""
    if node in addresses:
        return addresses[node]
    for name in (node, socket.gethostname()):
        with contextlib.suppress(OSError):
            found = [entry[4][0] for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
            for address in found:
                if not address.startswith("127."):
                    return address
    # Its name stands for the loopback device, as on Debian: ask the kernel from where it would go to the others.
    for other in nodes:
        if other != node:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((addresses.get(other, other), 9))
                return probe.getsockname()[0]
    return "127.0.0.1"


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def guess_end_time(job: ResolvedJob) -> float | None:
    """When Slurm ends the allocation, in unix seconds, if it has just begun; None where nobody ends it."""
    return time.time() + 60 * job.time_limit_min if "SLURM_JOB_ID" in os.environ and job.time_limit_min else None


def ask_slurm_end() -> float | None:
    """When Slurm ends the allocation, in unix seconds; None where it does not answer. May take 15 s."""
    with contextlib.suppress(UserError, ValueError):
        found = slurm.query_job(os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else None
        if found and found.end:
            return time.mktime(time.strptime(found.end, "%Y-%m-%dT%H:%M:%S"))
    return None


def ask_slurm_why() -> str | None:
    """Why Slurm sends a SIGTERM: "preemption", "time_limit" or "cancel"; None where it does not answer. May take 15 s."""
    found = None
    with contextlib.suppress(UserError):
        found = slurm.query_job(os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else None
    if found is None:
        return None
    if found.preempted or found.state.startswith("REQUEUE"):
        return "preemption"
    if found.state == "TIMEOUT" or found.reason == "TimeLimit":
        return "time_limit"
    return "cancel" if found.state == "CANCELLED" else None


def release_allocation() -> None:
    """Give the nodes of this job back. May take minutes."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    told("the first node is lost, and the batch script with it: giving the allocation back")
    for _ in range(RELEASE_TRIES):
        try:
            slurm.cancel([os.environ["SLURM_JOB_ID"]])
            return
        except UserError as error:
            told(str(error))
            time.sleep(RELEASE_PAUSE_S)


def main(path: str | Path, nodes: str | None = None, node: str | None = None, job_name: str | None = None) -> int:
    """Supervise this node until the job has ended; returns the job's exit code."""
    path = Path(path).absolute()
    job = read_job(path)
    entries = nodes.split(",") if nodes else expand_nodes(os.environ.get("SLURM_JOB_NODELIST", "")) or ["localhost"]
    addresses = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    names = [entry.partition("=")[0] for entry in entries]
    if names == ["localhost"]:
        addresses.setdefault("localhost", "127.0.0.1")
    node = node or os.environ.get("SLURMD_NODENAME") or (names[0] if len(names) == 1 else socket.gethostname())
    if node not in names:
        raise UserError(f"--node: {node} is not among the nodes {', '.join(names)}. Give one of them")
    if len(names) < job.nodes:
        raise UserError(f"{path}: nodes: {job.nodes} are wanted, {len(names)} given: {', '.join(names)}")
    if job_name is None:
        slurm = os.environ.get("SLURM_JOB_ID")
        job_name = f"{slurm}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if slurm else f"local-{secrets.token_hex(4)}"
        if slurm is None and len(names) > 1:
            raise UserError("--job: give all supervisors of a start of the job the same name, and no other start")
    log = path.parent / LOGS / f"{node}.supervisor.log"
    log.parent.mkdir(exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):  # what started it may be gone before it is: srun's pipes must not end it
        os.dup2(descriptor, stream)
    return Agent(path, job, names, node, job_name, addresses).supervise()
