"""Why a life of a job ended: code, data, node, network, storage, time limit, preemption, the user, or it has finished.

Pure: what the supervisors have seen goes in, a verdict comes out. `judge` finds the rank that was the first to fail, for
what the others say after it is mostly its consequence; reads what that rank has said; and looks at the lives before.
`remember_bad_node` and `load_bad_nodes` keep what it has found out about nodes for the jobs that come.
"""

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import lock_folder, write_json_atomic

CAUSES = (
    "finished", "stopped", "code", "data", "node", "network", "storage", "time_limit", "preemption", "user", "unknown"
)  # fmt: skip
MAX_SAME = 2  # lives with the same failure at the same step, after which it is the code or the data
MAX_STUCK = 6  # lives in a row that end no further than one before
EXIT_USER, EXIT_SAVED, EXIT_RESTART, EXIT_GIVE_UP = 2, 85, 86, 87  # as docs/resilience.md has them
BAD_NODES = "bad_nodes.json"
LOCK_WAIT_S = 5.0
EXCERPT_LINES = 60


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. Neither code nor signal: it still ran when the supervisors ended all."""

    rank: int
    node: str
    local_rank: int
    exit_code: int | None
    signal: int | None
    ended_at: float | None  # unix seconds
    log_tail: str


@dataclass(frozen=True)
class Evidence:
    """What is known when a life has ended."""

    life: int
    started_at: float
    at: float
    step: int | None  # the last that was seen; None: no step was done
    ranks: tuple[RankEnd, ...]
    lost_nodes: Mapping[str, str]  # node -> frozen | silent | gone
    hang: Mapping[str, Any] | None = None  # the trainer's `hang` event of this life
    notice: str | None = None  # time_limit | preemption | cancel | stop_file
    node_states: Mapping[str, str] | None = None  # what Slurm says of its nodes
    saved_step: int | None = None  # of the newest checkpoint; None: not known, and `step` counts as progress


@dataclass(frozen=True)
class Verdict:
    """What ended a life, and what that means for the next one."""

    cause: str  # one of CAUSES
    node: str | None  # where the first rank to fail ran, or the lost node. To blame only where cause is "node"
    reason: str  # one line
    excerpt: str  # of the first rank's log: its traceback, or what else its end says
    signature: str  # the failure without what differs from one time to the next
    step: int | None
    life: int
    stop: bool  # no further life: it would end the same way, or none is wanted
    exclude: bool = False  # the node is to be left out from now on, and remembered
    saved_step: int | None = None


class Rule:
    """What a text in a log says about the cause."""

    def __init__(
        self,
        cause: str,
        why: str,
        pattern: str,
        proof: bool = False,
        follows: bool = False,
        anywhere: bool | None = None,
    ) -> None:
        self.cause, self.why, self.pattern = cause, why, re.compile(pattern, re.IGNORECASE | re.MULTILINE)
        self.proof = proof  # of the node's hardware: once is enough to leave it out
        self.follows = follows  # said by a rank that has lost another one: never the first cause while another speaks
        # Told by the kernel or a GPU, beside the exceptions and errors of the process.
        self.anywhere = cause == "node" if anywhere is None else anywhere


FULL_DISK = "the disk is full"

# The first that fits is taken: hardware speaks through whatever call comes next, a file system through whatever is read
# or written, and both through the errors of those who wait for that rank.
RULES = (
    Rule(
        "node",
        "the GPU reports memory that it cannot correct",
        r"uncorrectable ECC|double.bit ECC|DRAM.?ECC",
        proof=True,
    ),
    Rule("node", "the GPU is gone from its bus", r"fallen off the bus|GPU is lost|GPU has fallen", proof=True),
    Rule("node", "the driver reports a fault of the GPU", r"\bXid\b[^\n]*: (48|6[234]|74|79|9[245]|1[12]\d|14\d)\b", proof=True),
    Rule("node", "NVLink has failed", r"uncorrectable NVLink|NVLink[^\n]{0,40}(fatal|uncorrectable)", proof=True),
    Rule(
        "node",
        "the node reports broken hardware",
        r"machine check|\bmce: |hardware (error|memory corruption)|uncorrected (memory )?error|\bEDAC\b[^\n]*\bUE\b",
        proof=True,
    ),
    Rule(
        "node",
        "the GPU or its driver does not work",
        r"no CUDA-capable device|CUDA driver initialization failed|driver/library version mismatch|nvidia-smi has failed|"
        r"initialize NVML|devices? is/are busy or unavailable|system not yet initialized|CUDA unknown error|"
        r"No CUDA GPUs are available|"
        r"CUDA error: (unknown error|hardware stack error)|Found no NVIDIA driver",
        anywhere=False,  # torch warns in the same words where no GPU is wanted
    ),
    Rule(
        "node",
        "a call to the GPU failed within NCCL, or a process that loads data has died",
        r"unhandled cuda error|ncclUnhandledCudaError|DataLoader worker \(pid[^\n]*(killed by signal|exited unexpectedly)",
        anywhere=False,
    ),
    Rule("node", "its network adapter has failed", r"local catastrophic error|NET/IB *: *Got async event[^\n]*port error"),
    Rule("node", "Slurm says that the node has failed", r"DUE TO NODE FAIL"),
    Rule(
        "node",
        "the node ran out of memory",
        r"oom.?kill|out of memory: kill|killed process \d+|cannot allocate memory|can't allocate memory|std::bad_alloc|"
        r"^MemoryError|numpy[\w.]*MemoryError",
    ),
    Rule(
        "node",
        "shared memory or a local disk of the node is full",
        r"insufficient shared memory|No space left on device[^\n]*['\"]?/(dev/shm|tmp|var/tmp|scratch_?local)\b|"
        r"/(dev/shm|tmp)/[^\n]*No space left on device",
    ),
    Rule(
        "storage",
        FULL_DISK,
        r"No space left on device|\bENOSPC\b|disk is full|than the disk has free|quota exceeded|\bEDQUOT\b",
    ),
    Rule(
        "storage",
        "the file system does not answer as it should",
        r"Input/output error|Remote I/O error|Stale (NFS )?file handle|Read-only file system|"
        r"Transport endpoint is not connected|Cannot send after transport endpoint shutdown|LustreError|"
        r"nfs: server [^\n]* not responding|(TimeoutError|OSError): \[Errno 110\] [^\n]*: ['\"]/",
    ),
    Rule(
        "storage",
        "the object store does not answer as it should",
        r"\bSlowDown\b|reduce your request rate|ServiceUnavailable|botocore\.exceptions|EndpointConnectionError|"
        r"gcsfs[\w.]*HttpError|(s3|gs|https?)://[^\n]*(5\d\d|timed? ?out)",
    ),
    Rule(
        "storage",
        "a file of weights is not whole",
        r"PytorchStream(Reader|Writer) failed|failed finding central directory|SafetensorError|Ran out of input|"
        r"UnpicklingError|pickle data was truncated",
    ),
    Rule(
        "data",
        "samples cannot be read",
        r"(samples|shards) in a row|shards or samples in a row|data\.stages kept none|tarfile\.\w*Error|"
        r"UnidentifiedImageError|cannot identify image file|image file is truncated|broken data stream|DecompressionBomb|"
        r"zlib\.error|BadGzipFile|incorrect (data|header) check|lzma\.LZMAError|JSONDecodeError|UnicodeDecodeError|"
        r"Arrow(Invalid|\w*Error)|parquet magic|does not match (its|the) (checksum|manifest|index)|checksum mismatch",
    ),
    Rule(
        "data",
        "a label or token is out of its range",
        r"Target \S+ is out of bounds|srcIndex < srcSelectDimSize|t >= 0 && t < n_classes|index out of range in self",
        anywhere=True,
    ),
    Rule("code", "the GPU's memory does not suffice", r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    Rule("network", "its port was taken", r"Address already in use|EADDRINUSE"),
    Rule(
        "network",
        "a name could not be looked up",
        r"name resolution|Name or service not known|getaddrinfo|gai error|no address associated",
    ),
    Rule("network", "the network does not carry", r"No route to host|Network is unreachable|Network is down"),
    Rule(
        "network",
        "a transfer over the fabric failed",
        r"NET/(IB|OFI)[^\n]*(completion|error|fail)|ibv_\w+[^\n]*fail|IBV_WC",
        follows=True,
    ),
    Rule(
        "network",
        "another rank did not answer",
        r"watchdog caught collective operation timeout|timed out waiting|timed out after \d+|Socket Timeout|"
        r"heartbeat monitor timed out|watchdog got stuck|wait timeout|monitored ?barrier[^\n]*failed|"
        r"client socket has (timed out|failed to connect)|DistStoreError|DistNetworkError|Connection timed out",
        follows=True,
    ),
    Rule(
        "network",
        "the connection to another rank is lost",
        r"connection (was )?(closed|reset)|closed by (the )?(remote )?peer|remote process exited|broken pipe|ncclRemoteError|recvValue failed|"
        r"got 0 bytes|another rank has ended|connection refused|ncclSystemError|ncclInternalError|EOF on connection|"
        r"NCCL communicator was aborted|enforce fail at[^\n]*gloo|op\.preamble\.length",
        follows=True,
    ),
)  # fmt: skip
# What a signal says where the log says nothing.
SIGNALS = {
    signal.SIGKILL: ("node", "the kernel does that when the node's memory is short"),
    signal.SIGBUS: ("node", "memory, /dev/shm or a mapped file of the node is not there any more"),
    signal.SIGILL: ("node", "this processor does not know an instruction"),
    signal.SIGSEGV: ("code", "a wrong access to memory, in C code"),
    signal.SIGABRT: ("code", "C code gave up"),
    signal.SIGFPE: ("code", "an impossible division, in C code"),
}
CRASH_SIGNALS = re.compile(r"ended by SIG(SEGV|ABRT|FPE|BUS|ILL)")
NEAR_STEPS = 10
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # sent by those who end a job
NOTICES = {"time_limit": "time_limit", "preemption": "preemption", "cancel": "stopped", "stop_file": "stopped"}
SLURM_ENDS = (
    ("time_limit", re.compile(r"CANCELLED AT \S+ DUE TO TIME LIMIT")),
    ("preemption", re.compile(r"CANCELLED AT \S+ DUE TO PREEMPTION")),
    ("stopped", re.compile(r"(STEP|JOB) \S+ ON \S+ CANCELLED AT \S+ \*\*\*")),
)
HEADER = re.compile(r"^=== life \d+ .*===$", re.MULTILINE)
PREFIX = re.compile(r"^(\[rank\d+\]: ?|\d{1,5}: |\[\d+\] )")  # of torch, of srun --label, of some launchers
OWN_CODE = re.compile(r'^\s*File "(?P<file>[^"]+)", line \d+, in (?P<function>\S+)')
EXCEPTION = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(: (?P<text>.*))?$")
FATAL = re.compile(
    r"^(error: |fatal|terminate called|what\(\): |RuntimeError|.*\bNCCL WARN\b|slurmstepd: error|srun: error)", re.I
)
IN_DATA = re.compile(
    r"(^|/)(data|data_tools|datasets?|webdataset|dataloader)/|(dataset|dataloader|loader)\.py|_utils/(fetch|worker)\.py"
)
OF_DATA = (
    "ValueError",
    "KeyError",
    "IndexError",
    "EOFError",
    "OSError",
    "SyntaxError",
    "FileNotFoundError",
    "struct.error",
    "TypeError",
)


@dataclass(frozen=True)
class Said:
    """What a rank's log says of its end."""

    rule: Rule | None
    error: str  # the line of its exception or its last word; "" where it says nothing
    place: str  # "file function" where that was raised, the innermost that is no library's
    in_data: bool  # it was raised in code that reads data, a library's or not
    excerpt: str


@dataclass(frozen=True)
class Failure:
    """One rank's own failure."""

    end: RankEnd
    said: Said
    cause: str
    why: str
    proof: bool = False
    follows: bool = False


def judge(
    evidence: Evidence, history: Sequence[Verdict], max_same: int = MAX_SAME, max_stuck: int = MAX_STUCK
) -> Verdict:
    """The verdict on a life, `history` being those on the lives before it, of all jobs of the run."""
    verdict = replace(find_cause(evidence), saved_step=evidence.saved_step)
    verdict = compare_with_history(verdict, history, max_same)
    if verdict.cause not in ("finished", "stopped") and not verdict.stop:
        stuck = count_stuck([*history, verdict])
        if stuck >= max_stuck:
            return replace(
                verdict, stop=True, reason=f"{stuck} lives in a row without progress; the last: {verdict.reason}"
            )
    return verdict


def find_cause(evidence: Evidence) -> Verdict:
    """The cause as this life alone tells it."""

    def say(cause: str, reason: str, failure: Failure | None = None, **facts: Any) -> Verdict:
        values = {
            "node": failure.end.node if failure else None,
            "excerpt": failure.said.excerpt if failure else "",
            "signature": sign(cause, failure) if failure else normalise(reason),
            "stop": False,
        }
        return Verdict(
            cause=cause, reason=one_line(reason), step=evidence.step, life=evidence.life, **{**values, **facts}
        )

    ranks = evidence.ranks
    if ranks and not evidence.lost_nodes and all(end.exit_code == 0 for end in ranks):
        return say("finished", "all ranks have finished", stop=True)

    failures = sorted(filter(None, map(read_failure, ranks)), key=lambda one: one.end.ended_at or evidence.at)
    own = [failure for failure in failures if not failure.follows]
    asked = judge_request(evidence, own)
    if asked:
        cause, reason = asked
        return say(cause, reason, stop=cause == "stopped" and evidence.notice is not None)
    if evidence.lost_nodes:
        cause, node, reason = judge_lost(evidence)
        return say(cause, reason, node=node, signature=f"{cause}: lost")
    if own:
        first = own[0]
        nodes = sorted({other.end.node for other in own if sign("", other) == sign("", first)})
        where = f"rank {first.end.rank} on {first.end.node}"
        more = f", and the same on {len(nodes) - 1} more nodes" if len(nodes) > 1 else ""
        tells = f": {first.said.error}" if first.said.error else ""
        end = describe_end(first.end)
        return say(
            first.cause, f"{where} {end}: {first.why}{more}{tells}", first,
            stop=first.end.exit_code == EXIT_GIVE_UP or first.cause == "user",
            exclude=first.proof,
        )  # fmt: skip
    if evidence.hang:
        cause, reason = judge_hang(evidence.hang)
        node = evidence.hang.get("host")
        return say(cause, reason, node=node, signature=normalise(f"{cause}: hang {evidence.hang.get('reason', '')}"))
    down = {node: state for node, state in (evidence.node_states or {}).items() if is_down(state)}
    if down:
        node, state = sorted(down.items())[0]
        return say("node", f"Slurm says that {node} is {state}", node=node, signature="node: down")
    if failures:
        first = failures[0]
        reason = f"rank {first.end.rank} on {first.end.node} {describe_end(first.end)}: {first.why}, and none says why"
        return say("network", f"{reason}: {first.said.error}" if first.said.error else reason, first)
    return say("unknown", "the ranks have ended without a word")


def judge_request(evidence: Evidence, own: Sequence[Failure]) -> tuple[str, str] | None:
    """The cause and reason where somebody has asked the job to end, and no rank failed by itself."""
    asked, told = NOTICES.get(evidence.notice or ""), [end for end in evidence.ranks if was_ended(end)]
    if asked is None:
        for cause, pattern in SLURM_ENDS:
            if any(pattern.search(last_life(end.log_tail)) for end in evidence.ranks):
                asked = cause
                break
    killed = [failure for failure in own if failure.end.signal == signal.SIGKILL and failure.said.rule is None]
    if len(own) > len(killed) or (own and asked is None) or evidence.lost_nodes:
        return None
    saved = sum(end.exit_code in (EXIT_SAVED, 0) for end in evidence.ranks)
    whole = "saved" if evidence.ranks and saved == len(evidence.ranks) else "ended before all ranks had saved"
    what = {"time_limit": "the time limit", "preemption": "preemption", "stopped": "asked to stop"}
    if asked is not None:
        how = f" by {'the stop file' if evidence.notice == 'stop_file' else 'the user'}" if asked == "stopped" else ""
        return asked, f"{what[asked]}{how}: {whole}"
    if told and len(told) == len(evidence.ranks) and not evidence.hang:
        if any(end.exit_code == EXIT_SAVED or end.signal in ENDINGS for end in told):
            return "stopped", f"asked to stop, by nobody that the launcher knows of: {whole}"
    return None


def was_ended(end: RankEnd) -> bool:
    """Whether a rank ended because it was told to."""
    return end.exit_code in (0, EXIT_SAVED) or end.signal in ENDINGS or (end.exit_code is None and end.signal is None)


def judge_lost(evidence: Evidence) -> tuple[str, str | None, str]:
    """Cause, node and reason where nodes have stopped to answer."""
    lost, nodes = sorted(evidence.lost_nodes.items()), {end.node for end in evidence.ranks} | set(evidence.lost_nodes)
    told = ", ".join(f"{node} is {how}" for node, how in lost)
    if len(lost) > 1 and 2 * len(lost) > len(nodes):
        return "network", None, f"{len(lost)} of {len(nodes)} nodes at once, so no single one is to blame: {told}"
    state = (evidence.node_states or {}).get(lost[0][0])
    return "node", lost[0][0], told + (f" (Slurm: {state})" if state else "")


def judge_hang(hang: Mapping[str, Any]) -> tuple[str, str]:
    """Cause and reason where the trainer found that nothing moved."""
    told = str(hang.get("reason", ""))
    cause = "unknown"
    if "does not answer" in told:
        cause = "node"
    elif "waits for its data" in told:
        cause = "storage"
    elif "another collective" in told:
        cause = "code"
    elif "did not arrive" in told:
        cause = "node"  # its GPU or processors are stuck; if it is the code, another node shows it at the same step
    return cause, f"nothing moved any more: rank {hang.get('rank')} on {hang.get('host')} {told}"


def is_down(state: str) -> bool:
    """Whether Slurm's word for a node's state says that it cannot be used; "*" means that it does not respond."""
    return state.endswith("*") or re.search(r"DOWN|FAIL|NOT_RESPONDING|REBOOT|POWERED", state.upper()) is not None


def read_failure(end: RankEnd) -> Failure | None:
    """What a rank's end is, and what it says; None for one that has finished or was ended."""
    if was_ended(end):
        return None
    said = read_log(end.log_tail)
    if end.exit_code == EXIT_RESTART and not (said.rule and said.rule.proof):
        return Failure(end, said, "network", "it has lost the others", follows=True)
    if end.exit_code == EXIT_GIVE_UP:
        cause = "data" if said.rule and said.rule.cause == "data" else "code"
        return Failure(end, said, cause, "the trainer gave up, see report.json in the run folder")
    if said.rule:
        rule = said.rule
        return Failure(end, said, rule.cause, rule.why, rule.proof, rule.follows)
    if end.signal in SIGNALS:
        return Failure(end, said, *SIGNALS[end.signal])
    if end.exit_code is not None and end.exit_code > 128 and end.exit_code - 128 in SIGNALS and not said.place:
        return Failure(end, said, *SIGNALS[end.exit_code - 128])  # as a shell in between tells a signal
    if end.exit_code == EXIT_USER or (end.exit_code in (126, 127) and not said.place):
        return Failure(end, said, "user", "a mistake that a restart does not mend")
    if said.place:
        name = said.error.split(":")[0].rpartition(".")[2]
        if said.in_data and name in OF_DATA:
            return Failure(end, said, "data", f"raised in {said.place}")
        return Failure(end, said, "code", f"raised in {said.place}")
    if said.error:
        return Failure(end, said, "code", "it ended with an error")
    return Failure(end, said, "unknown", "it says nothing")


def describe_end(end: RankEnd) -> str:
    if end.signal is not None:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(end.signal).name}"
        return f"ended by signal {end.signal}"
    return f"ended with exit code {end.exit_code}"


def last_life(log: str) -> str:
    """The part of a rank's log that its last life has written."""
    headers = list(HEADER.finditer(log))
    return log[headers[-1].end() :] if headers else log


def read_log(log: str) -> Said:
    """Find the failure in the end of a rank's log."""
    lines = [PREFIX.sub("", line) for line in last_life(log).splitlines()]
    tracebacks = find_tracebacks(lines)
    words = [line for line in lines if FATAL.match(line.strip())]
    errors = [traceback.error for traceback in tracebacks]
    heard = "\n".join(errors + words)
    everything = "\n".join(lines)
    rule = next((rule for rule in RULES if rule.anywhere and rule.pattern.search(everything)), None)
    rule = rule or next((rule for rule in RULES if rule.pattern.search(heard)), None)
    if rule is None and not tracebacks:
        rule = next((rule for rule in RULES if rule.pattern.search(everything)), None)
    if tracebacks:
        chosen = next((one for one in tracebacks if rule and rule.pattern.search(one.error)), tracebacks[-1])
        in_data = any(IN_DATA.search(file) for file in chosen.files)
        return Said(
            rule, first_words(chosen.error), chosen.place or tracebacks[0].place, in_data,
            cut(lines[tracebacks[0].start : tracebacks[-1].stop]),
        )  # fmt: skip
    told = [line.strip() for line in lines if rule and rule.pattern.search(line)] or [
        line.strip() for line in words[-1:]
    ]
    return Said(rule, told[0] if told else "", "", False, cut([line for line in lines if line.strip()][-15:]))


@dataclass(frozen=True)
class Traceback:
    """One of Python's tracebacks in a log."""

    start: int  # its first line
    stop: int  # the line after its last
    error: str
    place: str
    files: tuple[str, ...]  # of the innermost frame, and of the innermost that is no library's


def find_tracebacks(lines: Sequence[str]) -> list[Traceback]:
    found, index = [], 0
    while index < len(lines):
        if not lines[index].strip().startswith("Traceback (most recent call last)"):
            index += 1
            continue
        start, index, places = index, index + 1, []
        indent = len(lines[start]) - len(lines[start].lstrip())
        while index < len(lines) and (not lines[index].strip() or lines[index][: indent + 1].isspace()):
            match = OWN_CODE.match(lines[index])
            if match:
                places.append((match["file"], match["function"]))
            index += 1
        stop = index + 1
        while (
            stop < len(lines) and stop < index + 8 and lines[stop].strip() and not lines[stop].startswith("Traceback")
        ):
            stop += 1  # of a message of several lines
        if index < len(lines):
            text = "\n".join(line.strip() for line in lines[index:stop])
            ours = [place for place in places if "site-packages" not in place[0] and "/lib/python" not in place[0]]
            file, function = (ours or places or [("", "")])[-1]
            place = f"{shorten(file)} {function}" if file else ""
            innermost = places[-1][0] if places else ""
            found.append(Traceback(start, min(stop, len(lines)), text, place, (shorten(innermost), shorten(file))))
        index = stop
    return found


def shorten(file: str) -> str:
    """A file within its package: where a project lies says nothing about it, and may be called /data."""
    _, library, inside = file.rpartition("site-packages/")
    return inside if library else "/".join(file.split("/")[-2:])


def first_words(error: str) -> str:
    """Of an exception's text the line that says something."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def cut(lines: Sequence[str]) -> str:
    """The lines, without those in the middle where they are many."""
    lines = [line.rstrip() for line in lines]
    if len(lines) > EXCERPT_LINES:
        half = EXCERPT_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join(lines)


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def sign(cause: str, failure: Failure) -> str:
    """What is the same each time that this failure happens."""
    what = failure.said.error or describe_end(failure.end)
    return normalise(f"{cause}: {what} @ {failure.said.place}" if failure.said.place else f"{cause}: {what}")


def normalise(text: str) -> str:
    """A text without numbers, addresses, paths and names of hosts."""
    text = re.sub(r"0x[0-9a-fA-F]+", "<address>", text)
    text = re.sub(r"\b\d{1,3}(\.\d{1,3}){3}(:\d+)?\b", "<host>", text)
    text = re.sub(r"'?(?<![\w@])/[^\s:,'\"]+'?", "<path>", text)
    text = re.sub(r"\b[0-9a-f]{8,}\b", "<id>", text)
    text = re.sub(r"\b([A-Za-z][\w-]*?)\d+\b", r"\1<n>", text)
    text = re.sub(r"(?<![A-Za-z])[-+]?\d[\d.,]*(e[-+]?\d+)?", "<n>", text)
    return " ".join(text.split())[:300]


def compare_with_history(verdict: Verdict, history: Sequence[Verdict], max_same: int) -> Verdict:
    """The same failure at the same step is the code or the data; the same node twice is the node."""
    if verdict.cause in ("finished", "stopped", "time_limit", "preemption"):
        return verdict
    what = verdict.signature.partition(": ")[2]
    same = [
        old for old in history
        if old.signature.partition(": ")[2] == what and same_step(old, verdict) and old.cause not in NOTICES.values()
    ]  # fmt: skip
    lives = len(same) + 1
    at = f"at step {verdict.step}" if verdict.step is not None else "before the first step"
    elsewhere = len({old.node for old in [*same, verdict]}) > 1
    lost = verdict.signature.endswith(": lost") or verdict.signature == "node: down"
    if verdict.cause == "node":
        if same and elsewhere and not lost and not verdict.exclude and lives >= max_same:
            why = f"the same failure {at} in {lives} lives on different nodes, so it is the code or the data: "
            return replace(verdict, cause="code", stop=True, reason=why + verdict.reason)
    elif verdict.cause in ("code", "data", "unknown", "user") or FULL_DISK in verdict.reason:
        if lives >= max_same:
            cause = "code" if verdict.cause == "unknown" else verdict.cause
            return replace(verdict, cause=cause, stop=True, reason=f"the same {at} in {lives} lives: {verdict.reason}")
    if verdict.stop or verdict.node is None:
        return verdict
    # One node again and again, at other steps than a wrong program would choose.
    ambiguous = verdict.cause in ("node", "unknown") or verdict.signature.partition(": ")[2].startswith("ended by")
    before = [
        old for old in history
        if old.node == verdict.node and (old.cause in ("node", "unknown") or ": ended by" in old.signature)
    ]  # fmt: skip
    if ambiguous and before:
        why = f"{verdict.node} failed in {len(before) + 1} lives: {verdict.reason}"
        return replace(verdict, cause="node", exclude=True, reason=why)
    return verdict


def same_step(old: Verdict, new: Verdict) -> bool:
    """Whether two lives with the same failure ended at the same step.

    A trainer that dies of a signal of the processor cannot say where it was; its last sign of life is up to a second old.
    """
    if old.step is None or new.step is None:
        return old.step == new.step
    return abs(old.step - new.step) <= (NEAR_STEPS if CRASH_SIGNALS.search(new.signature) else 0)


def count_stuck(verdicts: Sequence[Verdict]) -> int:
    """How many of the last lives ended no further than one before them had."""
    best, stuck = -1, 0
    for verdict in verdicts:
        reached = verdict.saved_step if verdict.saved_step is not None else verdict.step
        reached = -1 if reached is None else reached
        stuck = 0 if reached > best else stuck + 1
        best = max(best, reached)
    return stuck


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the facts of a `verdict` event."""
    return asdict(verdict)


def recall_verdicts(events: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """The verdicts among a run's events, in order: what `judge` takes as history, over all jobs of the run.

    Where a verdict has stopped the run and it was submitted again, somebody has mended something: what came before is no
    measure for what comes now.
    """
    names = {field.name for field in fields(Verdict)}
    empty = {"node": None, "reason": "", "excerpt": "", "signature": "", "step": None, "life": 0, "stop": False}
    found: list[Verdict] = []
    for event in events:
        if event.get("event") in ("submitted", "job_start") and found and found[-1].stop:
            found.clear()
        if event.get("event") == "verdict" and event.get("cause") in CAUSES:
            found.append(Verdict(**{**empty, **{name: event[name] for name in names if name in event}}))
    return found


def load_bad_nodes(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Node -> when, in which run and why it was found bad; of a file that is not there, none.

    Raises UserError for a file that is not what `remember_bad_node` writes.
    """
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}. Mend it, or remove it to forget the bad nodes") from None
    if not isinstance(found, dict) or not all(isinstance(entries, list) for entries in found.values()):
        raise UserError(f"{path}: expected {{node: [{{time, run, reason}}]}}. Mend it, or remove it")
    return found


def remember_bad_node(path: str | Path, node: str, run: str, reason: str, now: Callable[[], float] = time.time) -> None:
    """Add an entry. Jobs that do so at the same time wait for each other, but not for one that hangs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while time.monotonic() < deadline_s:
            try:
                held.enter_context(lock_folder(path.parent))
                break
            except UserError:
                time.sleep(0.05)
        nodes = load_bad_nodes(path)
        entry = {"time": now(), "run": run, "reason": reason}
        write_json_atomic(path, {**nodes, node: [*nodes.get(node, []), entry]})
