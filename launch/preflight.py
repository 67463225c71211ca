"""Before a job trains: is each node fit, are all alike, and does each link carry what the others do?

`preflight` asks all nodes at once (`python -m pretrain doctor node`), then lets them exchange data in rounds of disjoint
pairs (`doctor link`). A node is compared with the middle of all, never with a number from a book; what looks bad is
measured again before anybody is accused, for on a busy machine a first measurement says little.
"""

import base64
import json
import os
import random
import secrets
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

PROBE_S = 25.0  # for the facts of all nodes
LATE_S = 15.0  # more, for those that did not answer
LINK_S = 25.0  # for a group's links
AGAIN_S = 10.0  # for one pair's
ALL_PAIRS_NODES = 16  # of up to so many nodes all pairs are measured; of more, so many partners of each
# Of the middle: a link that carries less is slow. Where processors move the data, other work disturbs it.
LINK_SHARES = {"sockets": 1 / 3, "gloo": 1 / 3, "nccl": 0.6}
PLAINLY_SLOW = 0.2
PROCESSOR_SHARE = 0.5
MEMORY_SHARE = 0.5
WRITE_SHARE = 0.1  # storage that is shared varies much
SKEW_S = 2.0
ROUGH_SKEW_S = 30.0
TOKEN = "preflight-token"  # as pretrain/doctor/node.py reads it

RunOnNodes = Callable[[list[str], list[str], float], dict[str, tuple[int | None, str]]]


@dataclass
class Findings:
    """What the preflight has found."""

    nodes: list[str]
    bad: dict[str, list[str]] = field(default_factory=dict)  # node -> reasons
    links: dict[tuple[str, str], str] = field(default_factory=dict)  # pair -> reason; its second node is in `bad` too
    everywhere: list[str] = field(default_factory=list)  # what is wrong on most nodes, so no node is to blame
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[tuple[str, str], float | None] = field(default_factory=dict)  # MB/s
    seconds: float = 0.0

    def accuse(self, node: str, reason: str) -> None:
        self.bad.setdefault(node, []).append(reason)


def preflight(
    run_on_nodes: RunOnNodes, nodes: Sequence[str], job: Any, timeout_s: float = 60.0
) -> dict[str, list[str]]:
    """The nodes that had better not take part, each with the reasons. For the supervisors; `job` as in the job file."""
    run = getattr(job, "run", None)
    folder = Path(run) / "launch" if run else None
    found = examine(run_on_nodes, nodes, getattr(job, "config", None), getattr(job, "overrides", []), folder, timeout_s)
    for text in found.everywhere:
        print(f"preflight: {text}", file=sys.stderr, flush=True)
    return found.bad


def examine(
    run_on_nodes: RunOnNodes,
    nodes: Sequence[str],
    config: str | None,
    overrides: Sequence[str],
    folder: str | Path | None,
    timeout_s: float = 60.0,
) -> Findings:
    """Ask the nodes, measure their links, and compare."""
    started_s, nodes = time.monotonic(), list(nodes)

    def left_s(most_s: float) -> float:
        return max(1.0, min(most_s, timeout_s - (time.monotonic() - started_s)))

    found, token = Findings(nodes), secrets.token_hex(8)
    node_command = [sys.executable, "-m", "pretrain", "doctor", "node", *([config, *overrides] if config else [])]
    if folder is not None:
        node_command += ["--folder", str(folder)]
        write_token(Path(folder), token, found)
    try:
        answers = run_on_nodes(nodes, node_command, left_s(PROBE_S))
        late = [node for node in nodes if answers[node][0] is None]
        if late and 2 * len(late) < len(nodes):  # what has to be read from a cold file system is there the second time
            answers = {**answers, **run_on_nodes(late, node_command, left_s(LATE_S))}
        found.facts = read_answers(answers, found)
        suspects = compare_nodes(found.facts, token if folder is not None else None)
        if suspects.rates:  # a rate may be low because of other work: ask those again, and take the better
            again = read_answers(run_on_nodes(sorted(suspects.rates), node_command, left_s(AGAIN_S)), Findings(nodes))
            for node, facts in again.items():
                for name in ("matmul_gflops", "write_mb_s"):
                    if facts.get(name, 0) > found.facts[node].get(name, 0):
                        found.facts[node][name] = facts[name]
            suspects = compare_nodes(found.facts, token if folder is not None else None)
    finally:
        if folder is not None:
            (Path(folder) / TOKEN).unlink(missing_ok=True)
    found.everywhere += suspects.everywhere
    for reasons in (suspects.facts, suspects.rates):
        for node, texts in reasons.items():
            for text in texts:
                found.accuse(node, text)
    measure_links(run_on_nodes, [node for node in nodes if node not in found.bad], found, left_s)
    found.seconds = time.monotonic() - started_s
    return found


def write_token(folder: Path, token: str, found: Findings) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKEN).write_text(token)
    except OSError as error:
        found.everywhere.append(f"{folder}: cannot be written from here: {error.strerror}")


def read_answers(answers: Mapping[str, tuple[int | None, str]], found: Findings) -> dict[str, dict[str, Any]]:
    """The JSON line of each node; one that gave none is accused."""
    facts = {}
    for node, (code, text) in answers.items():
        said = read_json_line(text)
        if said is not None:
            facts[node] = said
        elif code is None:
            found.accuse(node, "gave no answer in time")
        else:
            last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")
            found.accuse(node, f"could not be asked (exit code {code}): {last[:200]}")
    if len(found.bad) > len(answers) / 2 and len(answers) > 1:  # then it is the question, and not the nodes
        reasons = sorted({reason for texts in found.bad.values() for reason in texts})
        found.everywhere.append(
            f"{len(found.bad)} of {len(answers)} nodes could not be asked: {'; '.join(reasons[:2])}"
        )
        found.bad.clear()
    return facts


def read_json_line(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


@dataclass
class Suspects:
    """What sets nodes apart: facts, which stay as they are, and rates, which may be measured again."""

    facts: dict[str, list[str]] = field(default_factory=dict)
    rates: dict[str, list[str]] = field(default_factory=dict)
    everywhere: list[str] = field(default_factory=list)


def compare_nodes(facts: Mapping[str, Mapping[str, Any]], token: str | None) -> Suspects:
    """Compare the nodes with each other. Pure."""
    suspects = Suspects()
    most = len(facts) / 2

    def accuse(node: str, reason: str) -> None:
        suspects.facts.setdefault(node, []).append(reason)

    # Problems that a node has itself, unless most have the same: then it is the job or the cluster.
    kinds: dict[str, list[str]] = {}
    for node, said in facts.items():
        for problem in said.get("problems", []):
            kinds.setdefault(problem, []).append(node)
    for problem, having in kinds.items():
        if len(having) > most and len(facts) > 1:
            suspects.everywhere.append(f"{problem} (on {len(having)} of {len(facts)} nodes)")
        else:
            for node in having:
                accuse(node, problem)

    # What has to be the same everywhere.
    shown = {
        "code": ("code", lambda said: said.get("code")),
        "python": ("Python", lambda said: said.get("python")),
        "gpus": ("number of GPUs", lambda said: len(said.get("gpus", []))),
        "gpu names": ("kind of GPU", lambda said: sorted({gpu.get("name") for gpu in said.get("gpus", [])})),
        "driver": ("GPU driver", lambda said: sorted({gpu.get("driver") for gpu in said.get("gpus", [])})),
    }
    for name, (label, read) in shown.items():
        values = {node: json.dumps(read(said)) for node, said in facts.items()}
        usual = most_common(values.values())
        for node, value in values.items():
            if usual is not None and value != usual:
                detail = "" if name == "code" else f": {plain(value)} instead of {plain(usual)}"
                accuse(node, f"another {label} than the other nodes{detail}")
    packages = {node: said.get("packages", {}) for node, said in facts.items()}
    usual = most_common(json.dumps(value, sort_keys=True) for value in packages.values())
    for node, value in packages.items():
        if usual is not None and json.dumps(value, sort_keys=True) != usual:
            accuse(node, f"other packages than the other nodes: {describe_difference(value, json.loads(usual))}")
    if token is not None:
        for node, said in facts.items():
            if "token" in said and said["token"] != token:
                accuse(node, f"sees another {said.get('folder')} than this node: it is not shared")

    # Clocks: `doctor link` is exact, but has none where NCCL measures. This includes when each node was asked.
    times = {node: said["time"] for node, said in facts.items() if "time" in said}
    for node, value in times.items():
        off_s = value - statistics.median(times.values())
        if len(times) > 2 and abs(off_s) > ROUGH_SKEW_S:
            accuse(node, f"its clock is about {off_s:+,.0f} s off those of the others")

    # What has to be about the same.
    for name, label, share, rate in (
        ("memory_gib", "GiB of memory", MEMORY_SHARE, False),
        ("available_gib", "GiB of free memory", MEMORY_SHARE, False),
        ("write_mb_s", "MB/s written to the shared folder", WRITE_SHARE, True),
        ("matmul_gflops", "GFLOP/s", PROCESSOR_SHARE, True),
    ):
        values = {node: said[name] for node, said in facts.items() if isinstance(said.get(name), (int, float))}
        if len(values) < 3:
            continue
        middle = statistics.median(values.values())
        for node, value in values.items():
            if value < share * middle:
                where = suspects.rates if rate else suspects.facts
                where.setdefault(node, []).append(
                    f"{value:,.1f} {label}, where the middle of the nodes is {middle:,.1f}"
                )
    return suspects


def most_common(values: Iterable[str]) -> str | None:
    """The value that more than half have; None where there is none, so that nobody can be said to differ."""
    values = list(values)
    best = max(values, key=values.count, default=None)
    return best if values and 2 * values.count(best) > len(values) else None


def plain(value: str) -> str:
    value = json.loads(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_difference(found: Mapping[str, str], usual: Mapping[str, str]) -> str:
    names = sorted(name for name in {*found, *usual} if found.get(name) != usual.get(name))
    told = [f"{name} {found.get(name, 'missing')} instead of {usual.get(name, 'none')}" for name in names[:3]]
    return ", ".join(told) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def measure_links(
    run_on_nodes: RunOnNodes, nodes: list[str], found: Findings, left_s: Callable[[float], float]
) -> None:
    """Measure pairs of nodes, name slow nodes and slow links, and clocks that are off."""
    if len(nodes) < 2:
        return
    command = [sys.executable, "-m", "pretrain", "doctor", "link"]
    if len(nodes) > ALL_PAIRS_NODES:
        command += ["--rounds", str(ALL_PAIRS_NODES - 1)]
    clocks: dict[str, float] = {}
    backend = measure_group(run_on_nodes, nodes, command, found.rates, clocks, left_s)
    silent = find_silent(nodes, found.rates)
    good = [node for node in nodes if node not in silent]
    for node in silent if good else []:  # with one that works each has another chance
        if left_s(AGAIN_S) >= 3:
            measure_group(run_on_nodes, [good[0], node], command, found.rates, clocks, left_s, AGAIN_S)
    silent = find_silent(nodes, found.rates)
    if len(silent) == len(nodes):
        found.everywhere.append(
            "no two nodes could exchange data: look at the network between them, or at NCCL_* variables"
        )
        found.rates.clear()
        return
    for node in silent:
        found.accuse(node, "does not exchange data with the others")
    nodes = [node for node in nodes if node not in silent]
    found.rates = {pair: rate for pair, rate in found.rates.items() if not set(pair) & set(silent)}
    middle = reference(found.rates)  # of the first time: alone, a pair may do better than all could together
    limit = LINK_SHARES[backend] * middle
    if any(explain_rates(found.rates, limit)) and left_s(AGAIN_S) >= 3:
        measure_group(run_on_nodes, nodes, command, found.rates, clocks, left_s)
    tried: set[tuple[str, str]] = set()  # alone; what was slow there, too, is slow
    for pair in choose_again(*explain_rates(found.rates, limit), found.rates, nodes):
        if left_s(AGAIN_S) >= 3:
            measure_group(run_on_nodes, list(pair), command, found.rates, {}, left_s, AGAIN_S)
            tried.add(pair)
    slow_nodes, slow_pairs = explain_rates(found.rates, limit)
    for node in slow_nodes:
        alone = [found.rates[pair] or 0.0 for pair in tried if node in pair]
        if not alone or max(alone) >= limit:
            continue
        rates = [rate or 0.0 for pair, rate in found.rates.items() if node in pair]
        found.accuse(node, f"slow to all others: {statistics.median(rates):,.1f} MB/s, where others have {middle:,.0f}")
    for pair in tried.intersection(slow_pairs):
        rate = found.rates[pair] or 0.0
        reason = f"the link {pair[0]} - {pair[1]} carries {rate:,.1f} MB/s, where others carry {middle:,.0f}"
        found.links[pair] = reason
        found.accuse(pair[1], f"{reason}; one of both has to go")
    if len(clocks) > 2:
        middle_s = statistics.median(clocks.values())
        for node, offset_s in clocks.items():
            if abs(offset_s - middle_s) > SKEW_S:
                found.accuse(node, f"its clock is {offset_s - middle_s:+.1f} s off those of the others")


def find_silent(nodes: Sequence[str], rates: Mapping[tuple[str, str], float | None]) -> list[str]:
    """The nodes that have exchanged nothing with anybody."""
    speaking = {node for pair, rate in rates.items() if rate for node in pair}
    return [node for node in nodes if node not in speaking]


def measure_group(
    run_on_nodes: RunOnNodes,
    nodes: list[str],
    command: list[str],
    rates: dict[tuple[str, str], float | None],
    clocks: dict[str, float],
    left_s: Callable[[float], float],
    most_s: float = LINK_S,
) -> str:
    """Measure the pairs of a group, and add what was found to `rates` (the better of several) and `clocks`.

    Where it fails as a whole, its halves are tried: so one node that breaks a group is found among many. Returns what has
    moved the data.
    """
    answers = {node: read_json_line(text) for node, (_, text) in run_on_nodes(nodes, command, left_s(most_s)).items()}
    answered = {node: said for node, said in answers.items() if said is not None}
    index = {node: place for place, node in enumerate(nodes)}
    done = set()
    for node, said in answered.items():
        if "offset_s" in said:
            clocks[node] = -said["offset_s"]
        for peer, rate in said.get("mb_s", {}).items():
            other = nodes[int(peer)]
            pair = tuple(sorted((node, other), key=index.get))
            theirs = (answered.get(other) or {}).get("mb_s", {}).get(str(index[node]))
            both = None if rate is None or theirs is None else min(rate, theirs)  # of the two directions the slower
            if both is not None:
                done |= set(pair)
            if pair not in rates or (both or 0.0) > (rates[pair] or 0.0):
                rates[pair] = both
    if not done and len(nodes) > 2 and left_s(most_s) > 3:
        half = (len(nodes) + 1) // 2
        for part in (nodes[:half], nodes[half:]):
            if len(part) > 1:
                measure_group(run_on_nodes, part, command, rates, clocks, left_s, most_s)
    return next((said["backend"] for said in answered.values() if said.get("backend") in LINK_SHARES), "sockets")


def reference(rates: Mapping[tuple[str, str], float | None]) -> float:
    """What a good link carries: the middle of all that are not plainly slow. A bad node makes all of its links bad, so what is
    plainly slow is told by the middle of the nodes' best links."""
    best: dict[str, float] = {}
    for pair, rate in rates.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), rate or 0.0)
    if not best:
        return 0.0
    usual = statistics.median_high(best.values())
    return statistics.median(rate for rate in rates.values() if rate and rate >= PLAINLY_SLOW * usual)


def explain_rates(
    rates: Mapping[tuple[str, str], float | None], limit: float
) -> tuple[list[str], list[tuple[str, str]]]:
    """The slow nodes, and the slow links between nodes that are not slow: those below `limit`. Pure.

    A node is slow if most of its links are, and more than one; taken one by one, the worst first, for its links must not
    speak against its partners.
    """
    left, slow_nodes = dict(rates), []
    while True:
        of_node: dict[str, list[bool]] = {}
        for pair, rate in left.items():
            for node in pair:
                of_node.setdefault(node, []).append((rate or 0.0) < limit)
        worst = max(
            of_node, key=lambda node: (sum(of_node[node]), sum(of_node[node]) / len(of_node[node])), default=None
        )
        if worst is None or sum(of_node[worst]) < 2 or 2 * sum(of_node[worst]) <= len(of_node[worst]):
            break
        slow_nodes.append(worst)
        left = {pair: rate for pair, rate in left.items() if worst not in pair}
    return sorted(slow_nodes), sorted(pair for pair, rate in left.items() if (rate or 0.0) < limit)


def choose_again(
    slow_nodes: Sequence[str],
    slow_pairs: Sequence[tuple[str, str]],
    rates: Mapping[tuple[str, str], float | None],
    nodes: Sequence[str],
) -> list[tuple[str, str]]:
    """The pairs to measure once more, alone: the slow links, and of each slow node two links to nodes that are not."""
    good = [node for node in nodes if node not in slow_nodes and not any(node in pair for pair in slow_pairs)]
    chosen = list(slow_pairs[:4])
    for node in slow_nodes[:4]:
        pairs = [pair for pair in rates if node in pair and (pair[0] in good or pair[1] in good)]
        chosen += sorted(pairs, key=lambda pair: -(rates[pair] or 0.0))[:2]
    return chosen


# --- by hand: python -m launch preflight JOB ---------------------------------------------------------------------------


def run(config: str, overrides: Sequence[str] = (), hosts: str | None = None) -> int:
    """Print what the preflight finds on the nodes of this allocation, on hosts reached by ssh, or on this machine.

    Exit code 1 if there is something to mend.
    """
    from launch.job import load_job

    job = load_job(config, list(overrides))
    if getattr(job, "preflight", None) is None:
        raise UserError(f"{config}: kind: {job.kind}: only nodes that train together are compared, and here none do")
    if hosts:
        nodes, run_on_nodes = [host for host in hosts.split(",") if host], run_by_ssh
    elif os.environ.get("SLURM_JOB_ID"):
        nodes, run_on_nodes = list_allocation(), run_by_srun
    else:
        nodes, run_on_nodes = [socket.gethostname()], run_here
    if job.working_directory:
        os.chdir(job.working_directory)  # where relative paths start
    folder = Path(job.run) / "launch" if job.run else None
    found = examine(run_on_nodes, nodes, job.config, job.overrides, folder, job.preflight.timeout_s)
    print(render(found))
    return 1 if found.bad or found.everywhere else 0


def render(found: Findings) -> str:
    """For people, at 80 columns."""
    lines = [f"preflight of {len(found.nodes)} nodes, {found.seconds:.0f} s"]
    for node in found.nodes:
        facts = found.facts.get(node, {})
        rates = [rate for pair, rate in found.rates.items() if node in pair and rate is not None]
        told = [f"{facts['matmul_gflops']:,.0f} GFLOP/s"] if "matmul_gflops" in facts else []
        told += [f"writes {facts['write_mb_s']:,.0f} MB/s"] if "write_mb_s" in facts else []
        told += [f"links {min(rates):,.0f} to {max(rates):,.0f} MB/s"] if rates else []
        lines.append(f"{node:<16} {'BAD ' if node in found.bad else 'good'}  {', '.join(told)}")
        lines += [f"    {reason}" for reason in found.bad.get(node, [])]
    if found.rates:
        lines.append(
            f"{len(found.rates)} of {len(found.nodes) * (len(found.nodes) - 1) // 2} pairs of nodes were measured"
        )
    lines += [f"everywhere: {text}" for text in found.everywhere]
    return "\n".join(lines)


def list_allocation() -> list[str]:
    """The nodes of the Slurm job that this process runs in."""
    names = os.environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", names]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"SLURM_JOB_NODELIST={names}: scontrol does not tell its nodes: {error}") from None


def group_variables(nodes: Sequence[str]) -> dict[str, str]:
    port = random.SystemRandom().randrange(20000, 60000)  # of another node: it cannot be asked which are free
    return {"NNODES": str(len(nodes)), "MASTER_ADDR": nodes[0], "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}


def run_by_srun(nodes: list[str], command: list[str], timeout_s: float) -> dict[str, tuple[int | None, str]]:
    """Run a command once on each of some nodes of this allocation. As `run_on_nodes`."""
    # Each task finds its rank in the list, and says last how its command ended. In base64, for srun breaks long lines.
    script = (
        'place=0; for node in $PREFLIGHT_NODES; do [ "$node" = "$SLURMD_NODENAME" ] && break; place=$((place + 1)); done; '
        'export NODE_RANK=$place; { "$@" 2>&1; echo "exit $? $SLURMD_NODENAME"; } | base64 -w 512'
    )
    words = [
        "srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpus-per-task=1",
        f"--nodelist={','.join(nodes)}", "--label", "--kill-on-bad-exit=0", "--no-kill", "--export=ALL",
        "sh", "-c", script, "sh", *command,
    ]  # fmt: skip
    # All GPUs of the node; what else the allocation says of GPUs and tasks would be taken as a wish of this step.
    gpus = os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE")
    total = os.environ.get("SLURM_GPUS", "").rpartition(":")[2]
    if not gpus and total.isdigit():
        gpus = str(int(total) // int(os.environ.get("SLURM_JOB_NUM_NODES", len(nodes))))
    words[1:1] = [f"--gpus-per-node={gpus}"] if gpus else []
    kept = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("SLURM_NTASKS", "SLURM_TASKS", "SLURM_GPU", "SLURM_TRES"))
    }
    environment = {**kept, **group_variables(nodes), "PREFLIGHT_NODES": " ".join(nodes)}
    code, text = run_bounded(words, timeout_s, environment)
    parts: dict[str, str] = {}
    for line in text.splitlines():
        task, _, said = line.partition(": ")
        if task.strip().isdigit():
            parts[task] = parts.get(task, "") + said.strip()
    if not parts:  # srun itself has something to say
        return dict.fromkeys(nodes, (code, text))
    found: dict[str, tuple[int | None, str]] = dict.fromkeys(nodes, (None, ""))
    for coded in parts.values():
        *said, last = base64.b64decode(coded[: len(coded) // 4 * 4]).decode(errors="replace").splitlines() or [""]
        end = last.split(" ")
        if end[0] == "exit" and len(end) == 3 and end[2] in found:
            found[end[2]] = (int(end[1]), "\n".join(said))
    return found


def run_by_ssh(nodes: list[str], command: list[str], timeout_s: float) -> dict[str, tuple[int | None, str]]:
    """Run a command on each host by ssh, in the folder that this process is in."""
    shared = group_variables(nodes)
    # The address by which the others reach the first host is what it calls itself in our list.
    passed = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    words = {}
    for rank, node in enumerate(nodes):
        values = [*(f"{name}={text}" for name, text in shared.items()), f"NODE_RANK={rank}", *passed]
        line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join(values)} {shlex.join(command)} 2>&1"
        words[node] = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", node, line]
    return run_together(words, timeout_s, {})


def run_here(nodes: list[str], command: list[str], timeout_s: float) -> dict[str, tuple[int | None, str]]:
    """Run a command on this machine, once for each of its names."""
    shared = {**group_variables(nodes), "MASTER_ADDR": "127.0.0.1"}
    words = {node: ["env", f"NODE_RANK={rank}", *command] for rank, node in enumerate(nodes)}
    return run_together(words, timeout_s, shared)


def run_together(
    words: Mapping[str, Sequence[str]], timeout_s: float, more: Mapping[str, str]
) -> dict[str, tuple[int | None, str]]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(words)) as threads:
        started = {
            node: threads.submit(run_bounded, list(line), timeout_s, {**os.environ, **more})
            for node, line in words.items()
        }
        return {node: future.result() for node, future in started.items()}


def run_bounded(words: list[str], timeout_s: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code, None if it had to be killed, and stdout with stderr."""
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=dict(environment), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, f"{words[0]}: {error.strerror}"
    try:
        text = process.communicate(timeout=timeout_s)[0]
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
