"""How a run is getting on: status, logs, top and list, from Slurm where it answers and from the run's own files always.

RUN/launch/state.json        the supervisors' view, each second or two
RUN/progress, metrics.jsonl  the ranks' own; events.jsonl, done.json
"""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from launch import slurm, submit
from launch.events import read_launch_events, read_lines
from launch.job import JobConfig, ResolvedJob, load_job, read_job, resolve_job

WIDTH = 80
STALE_S = 15.0  # older signs of life are called old
TAIL_BYTES = 2**16
POLL_S = 0.3
NOT_SHOWN = ("time", "event", "job", "job_id", "signature", "saved_step", "world_size", "excerpt", "start", "backend")


def find_run(place: str) -> Path:
    """The run folder that a user means: by itself, or by its job file. Raises UserError."""
    path = Path(place)
    if path.is_file():
        job = load_job(path, [])
        if not isinstance(job, JobConfig):
            raise UserError(f"{place}: an array has no run folder. Its logs are in {job.output}")
        path = Path(resolve_job(job).run)
    if not (path / "launch" / "job.json").is_file():
        raise UserError(f"{path}: holds no launch/job.json. Give the run folder of a submitted job, or its job file")
    return Path(os.path.abspath(path))


def collect(run: Path, own: list[slurm.SlurmJob] | UserError | None = None) -> dict[str, Any]:
    """All that is known of a run, as plain values. Waits for Slurm at most some seconds; `own`: what squeue has said."""
    job = read_job(run / "launch" / "job.json")
    records = submit.read_records(run)
    facts: dict[str, Any] = {"run": str(run), "name": job.name, "kind": job.kind}
    facts["jobs"], facts["away"] = ask_jobs(job, records, own)
    state = read_object(run / "launch" / "state.json")
    facts["supervisors"] = state | {"age_s": time.time() - state["time"]} if state else None
    facts |= read_progress(run)
    facts["stopped"] = " ".join(read_text(run / "launch" / "stopped").split()[2:]) or None
    events = read_launch_events(run)
    facts["lives"] = sum(event["event"] == "life_start" for event in events)
    facts["events"] = events[-5:]
    facts["state"] = name_state(facts)
    return facts


def ask_jobs(
    job: ResolvedJob, records: list[dict[str, Any]], own: list[slurm.SlurmJob] | UserError | None
) -> tuple[list[dict[str, Any]], str | None]:
    """The run's jobs that have not ended, else the last one; and why they are not known."""
    if not records:
        return [], None
    last = records[-1]
    try:
        if isinstance(own, UserError):
            raise own
        if job.kind != "slurm":
            alive = submit.local.find_alive(job, last.get("processes", {}))
            state = "RUNNING" if any(alive.values()) else "UNKNOWN" if None in alive.values() else "ENDED"
            return [{"job_id": last["job_id"], "state": state, "nodes": ",".join(alive)}], None
        ids = [record["job_id"] for record in records if record["job_id"]]
        active = [vars(one) for one in (slurm.list_jobs() if own is None else own) if one.job_id in ids]
        for one in active:
            if one["state"] != "PENDING":
                one |= vars(slurm.query_job(one["job_id"]) or slurm.SlurmJob(one["job_id"], one["state"]))
        if not active and ids:
            found = slurm.query_job(ids[-1])
            return [vars(found) if found else {"job_id": ids[-1], "state": "FORGOTTEN", "nodes": ""}], None
        return active, None
    except UserError as error:
        return [{"job_id": last["job_id"] or "?", "state": "UNKNOWN", "nodes": ""}], str(error).partition("; ")[0]


def read_progress(run: Path) -> dict[str, Any]:
    """Where the run stands by its own files: step, steps, samples/s, loss, seconds left, what was saved last."""
    facts: dict[str, Any] = {"done": is_done(run), "step": None, "steps": None, "saved": None}
    for event in read_lines(run / "events.jsonl"):
        if event.get("event") == "start":
            facts |= {"steps": event.get("steps"), "world_size": event.get("world_size"), "step": event.get("step")}
        elif event.get("event") == "save":
            facts["saved"] = {"step": event["step"], "age_s": time.time() - event["time"]}
    metrics = read_last_line(run / "metrics.jsonl")
    facts["metrics"] = {
        "step": metrics.get("step"),
        "loss": metrics.get("loss/total"),
        "samples_per_s": metrics.get("rate/samples_per_s"),
        "step_s": metrics.get("time/step_s"),
    }
    sign = read_object(run / "progress" / "rank-00000.json")
    if sign:
        facts["sign"] = {"phase": sign.get("phase"), "age_s": time.time() - sign.get("time", 0)}
    steps = [value for value in (facts["step"], metrics.get("step"), sign.get("step")) if isinstance(value, int)]
    facts["step"] = max(steps) if steps else None
    step_s = facts["metrics"]["step_s"]
    if step_s and facts["steps"] is not None and facts["step"] is not None:
        facts["left_s"] = max(0, facts["steps"] - facts["step"]) * step_s
    return facts


def is_done(run: Path) -> bool:
    """Whether the run has reached its duration since it was last submitted, which may have been for a longer one."""
    try:
        return (run / "done.json").stat().st_mtime_ns > (run / "launch" / "job.json").stat().st_mtime_ns
    except FileNotFoundError:
        return False


def name_state(facts: dict[str, Any]) -> str:
    """One word: done, running, queued, ending, stopped, ended or unknown."""
    states = {job["state"] for job in facts["jobs"]}
    supervised = facts["supervisors"] and facts["supervisors"]["age_s"] < STALE_S
    if states & {"RUNNING", "CONFIGURING"} or (states == {"UNKNOWN"} and supervised):
        return "running"
    if "COMPLETING" in states:
        return "ending"
    if facts["done"]:
        return "done"
    if "PENDING" in states:
        return "queued"
    if facts["stopped"]:
        return "stopped"
    return "unknown" if "UNKNOWN" in states or not states else "ended"


def render_status(facts: dict[str, Any]) -> str:
    """The facts in lines of at most 80 columns."""
    lines = [("run", facts["run"]), ("state", facts["state"] + (f": {facts['stopped']}" if facts["stopped"] else ""))]
    for job in facts["jobs"]:
        lines.append(("job", describe_job(job)))
    if facts["away"]:
        lines.append(("", f"Slurm does not answer ({facts['away']}); the rest is from the run's own files"))
    step, steps, metrics = facts["step"], facts["steps"], facts["metrics"]
    if step is not None:
        of = f" of {steps:,} ({100 * step / steps:.1f}%)" if steps else ""
        loss = f", loss {metrics['loss']:.4g} at step {metrics['step']:,}" if metrics["loss"] is not None else ""
        lines.append(("progress", f"step {step:,}{of}{loss}"))
    if metrics["samples_per_s"] is not None and metrics["step_s"] is not None:
        left = f", {format_s(facts['left_s'])} left" if facts["state"] == "running" and "left_s" in facts else ""
        lines.append(("speed", f"{metrics['samples_per_s']:,.1f} samples/s, {metrics['step_s']:.3g} s a step{left}"))
    if facts["saved"]:
        lines.append(("saved", f"step {facts['saved']['step']:,}, {format_s(facts['saved']['age_s'])} ago"))
    if facts.get("sign"):
        lines.append(("sign", f"rank 0 in phase {facts['sign']['phase']}, {format_s(facts['sign']['age_s'])} ago"))
    if facts["supervisors"]:
        lines.append(("nodes", describe_nodes(facts["supervisors"])))
    for event in facts["events"]:
        lines.append(("event", describe_event(event)))
    return "\n".join(fold(name, text) for name, text in lines)


def fold(name: str, text: str) -> str:
    """A named line, continued below its text where it is too long."""
    parts, rest = [], text
    while len(rest) > WIDTH - 11:
        cut = rest.rfind(" ", 0, WIDTH - 10)
        cut = cut if cut > 0 else WIDTH - 11
        parts.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return "\n".join(
        f"{label:10} {part}".rstrip() for label, part in zip([name] + [""] * len(parts), [*parts, rest], strict=True)
    )


def describe_job(job: dict[str, Any]) -> str:
    text = f"{job['job_id']} {job['state'].lower()}"
    if job.get("reason") not in (None, "", "None"):
        text += f" ({job['reason']})"
    if job.get("nodes"):
        text += f" on {job['nodes']}"
    if job["state"] == "PENDING":
        return text + (f", may start {job['start']}" if job.get("start") else "")
    if job.get("start"):
        text += f", since {job['start']}"
    if job.get("end"):
        text += f", {'ends' if job['state'] == 'RUNNING' else 'ended'} {job['end']}"
    if job.get("exit_code"):
        text += f", exit code {job['exit_code']}"
    if job.get("restarts"):
        text += f", restart {job['restarts']}"
    return text


def describe_nodes(state: dict[str, Any]) -> str:
    nodes = [f"{name} {node.get('state', '?')}" for name, node in state.get("nodes", {}).items()]
    text = f"life {state.get('life')}, {state.get('phase')}: " + ", ".join(nodes[:16])
    text += f" and {len(nodes) - 16} more" if len(nodes) > 16 else ""
    if state.get("spares"):
        text += f"; spare {', '.join(state['spares'])}"
    return text + (f"; said {format_s(state['age_s'])} ago" if state["age_s"] > STALE_S else "")


def describe_event(event: dict[str, Any]) -> str:
    moment = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
    facts = []
    for name, value in event.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name not in NOT_SHOWN and value not in (None, False, "", [], {}) and not isinstance(value, dict):
            facts.append(f"{name} {text if len(text) < 120 else text[:117] + '...'}")
    return f"{moment} {event['event']}: {', '.join(facts)}"


def format_s(seconds: float) -> str:
    """A duration for people: 4 s, 3 min 20 s, 2 h 08 min, 3 d 4 h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def render_ranks(run: Path, most: int = 32) -> str:
    """A table of the ranks by their signs of life, those that are behind first."""
    signs = [read_object(path) for path in sorted((run / "progress").glob("rank-*.json"))]
    now = time.time()
    rows = (
        sorted((sign.get("step", 0), -(now - sign.get("time", now)), sign) for sign in signs if sign) if signs else []
    )
    lines = [f"{'rank':>6} {'host':20} {'step':>10} {'phase':10} {'for':>12} {'seen':>10}"]
    for step, age, sign in rows[:most]:
        phase_s = now - sign.get("since", now)
        lines.append(
            f"{sign.get('rank', '?'):>6} {str(sign.get('host', '?'))[:20]:20} {step:>10,} {str(sign.get('phase'))[:10]:10} "
            f"{format_s(phase_s):>12} {format_s(-age):>10}"
        )
    if len(rows) > most:
        lines.append(f"{len(rows) - most} more ranks, none of them further behind")
    return "\n".join(lines)


def show_status(place: str, as_json: bool) -> None:
    facts = collect(find_run(place))
    print(json.dumps(facts, indent=2, default=str) if as_json else render_status(facts))


def show_top(place: str, every_s: float) -> None:
    """The status and the ranks, again and again until Ctrl-C; once where nobody looks."""
    run = find_run(place)
    while True:
        text = render_status(collect(run)) + "\n\n" + render_ranks(run)
        if not sys.stdout.isatty():
            print(text)
            return
        print(f"\033[H\033[2J{text}\n\nevery {every_s:g} s; Ctrl-C ends this view, not the run", flush=True)
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            return


def show_list(folders: list[str]) -> None:
    """One line for each run below the folders."""
    runs = [
        path.parents[1]
        for folder in folders
        for depth in ("*", "*/*", "*/*/*")
        for path in Path(folder).glob(f"{depth}/launch/job.json")
    ]
    if not runs:
        print(f"no submitted runs below {', '.join(folders)}")
        return
    print(f"{'run':36} {'state':9} {'step':>9} {'of':>9} {'job':>12}")
    try:  # once for all
        own: list[slurm.SlurmJob] | UserError = slurm.list_jobs() if shutil.which("squeue") else []
    except UserError as error:
        own = error
    for run in sorted(set(runs), key=lambda run: (run / "launch" / "job.json").stat().st_mtime, reverse=True):
        try:
            facts = collect(run, own)
        except UserError as error:
            print(f"{str(run)[-36:]:36} unreadable: {error}")
            continue
        step, steps = (f"{value:,}" if value is not None else "-" for value in (facts["step"], facts["steps"]))
        job = facts["jobs"][0]["job_id"] if facts["jobs"] else "-"
        print(f"{str(run)[-36:]:36} {facts['state']:9} {step:>9} {steps:>9} {job:>12}")


class RankLog:
    """One rank's log, read as it grows. `host` is that of the life to which the last line belongs."""

    def __init__(self, path: Path, host: str) -> None:
        self.path, self.host, self.offset, self.rest = path, host, 0, b""
        self.rank = int(path.stem.partition("-")[2])

    def read(self, most_bytes: int | None = None) -> Iterator[str]:
        """New whole lines with their prefix; `most_bytes` leaves out what is further from the end."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return
        if size < self.offset:  # somebody has emptied it
            self.offset, self.rest = 0, b""
        with open(self.path, "rb") as file:
            start = self.offset if most_bytes is None else max(self.offset, size - most_bytes)
            file.seek(start)
            data = self.rest + file.read(size - start)
        self.offset = size
        lines = data.split(b"\n")
        self.rest = lines.pop()
        if start > 0 and most_bytes is not None and lines:
            lines.pop(0)  # cut in two
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if text.startswith("=== life ") and len(text.split()) > 3:
                self.host = text.split()[3]
            yield f"{self.host}:{self.rank} | {text}"


def find_logs(run: Path, ranks: list[int]) -> list[RankLog]:
    hosts = {}
    for event in read_launch_events(run):
        if event["event"] == "life_start":
            hosts |= {rank: node for node, own in event.get("ranks", {}).items() for rank in own}
    logs = []
    for path in sorted((run / "launch" / "logs").glob("rank-*.log")):
        rank = int(path.stem.partition("-")[2])
        if not ranks or rank in ranks:
            logs.append(RankLog(path, hosts.get(rank, "?")))
    return logs


def show_logs(place: str, ranks: list[int], lines: int, follow: bool) -> None:
    """The last lines of each rank, each with `host:rank`; then, if asked, those to come, as they come."""
    run = find_run(place)
    logs = {log.path: log for log in find_logs(run, ranks)}
    if not logs and not follow:
        found = ", ".join(sorted(path.name for path in (run / "launch" / "logs").glob("*.log"))) or "none"
        raise UserError(
            f"{run}: no rank has a log yet{' of those asked for' * bool(ranks)}. Other logs in launch/logs: {found}"
        )
    for log in logs.values():
        found = list(log.read(TAIL_BYTES + 200 * lines))
        for line in found[max(0, len(found) - lines) :]:
            print(line)
    while follow:
        sys.stdout.flush()
        time.sleep(POLL_S)
        for log in find_logs(run, ranks):
            logs.setdefault(log.path, log)
        for log in logs.values():
            for line in log.read():
                print(line)


def wait_for_end(run: Path) -> int:
    """Show the ranks' logs until the run's jobs have ended; returns the exit code of the last one."""
    logs: dict[Path, RankLog] = {}
    looked_s = 0.0
    while True:
        for log in find_logs(run, []):
            logs.setdefault(log.path, log)
        for log in logs.values():
            for line in log.read():
                print(line, flush=True)
        if time.monotonic() - looked_s > 2.0:
            looked_s = time.monotonic()
            facts = collect(run)
            if facts["state"] in ("done", "ended", "stopped"):
                code = None
                for event in read_launch_events(run):
                    code = None if event["event"] == "submitted" else event.get("code", code)
                return code if code is not None else next((one.get("exit_code") for one in facts["jobs"]), None) or 1
        time.sleep(POLL_S)


def cancel(place: str, now: bool) -> None:
    """Have a run saved and stopped, or, `now`, ended at once. No job of it begins any more until it is resumed."""
    run = find_run(place)
    job = read_job(run / "launch" / "job.json")
    records = submit.read_records(run)
    (run / "launch" / "stopped").write_text(f"85 - cancelled by {os.environ.get('USER', 'its user')}\n")
    active = submit.find_active(job, records)
    asked = [] if now else [job_id for job_id in active if ask_to_stop(run, job_id)]
    ended = [job_id for job_id in active if job_id not in asked]
    if job.kind == "slurm":
        slurm.cancel(ended)
    else:
        for record in records:
            if record["job_id"] in ended:
                submit.local.send_signal(job, record["processes"], signal.SIGKILL)
    if ended:
        print(f"ended   {', '.join(ended)}")
    if asked:
        print(f"asked   {', '.join(asked)} to save and stop; with --now it is ended at once")
    if not active:
        print("no job of this run is there; none will begin")
    print(f"next    python -m launch resume {shlex.quote(place)}")


def ask_to_stop(run: Path, job_id: str) -> bool:
    """Tell the supervisors of a job, by the run folder, to have the ranks save and then end; False where none has started."""
    folder = run / "launch" / "jobs"  # JOB-RESTARTS of Slurm's, else JOB
    starts = sorted([*folder.glob(f"{job_id}-*"), *folder.glob(job_id)], key=lambda path: path.stat().st_mtime)
    if not starts or (starts[-1] / "end").exists():
        return False
    (starts[-1] / "notice").write_text("cancel\n")
    return True


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read now."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def read_last_line(path: Path) -> dict[str, Any]:
    """The last whole JSON line of a file that may be long; {} where there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}
