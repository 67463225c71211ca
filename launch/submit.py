"""Submitting a run: what is kept in RUN/launch, in which order, and what is told of it. The same for all backends.

RUN/launch/job.json        the resolved job, which the supervisors read
RUN/launch/code/           the code; config.yaml: the checked run config
RUN/launch/NAME.sbatch     the script; of kinds local and ssh NAME.sh
RUN/launch/jobs.jsonl      each submission: time, backend, job_id, token, script, log, command
RUN/launch/submissions/    which job a submission has become
RUN/launch/secret          the key with which the supervisors sign what they tell each other
RUN/launch/stopped         "CODE REASON": no job of the run begins any more
RUN/launch/logs/           one of each rank, supervisor and job
"""

import contextlib
import os
import secrets
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import append_json_line, lock_folder, write_atomic, write_json_atomic
from launch import local, slurm, snapshot
from launch.events import append_event, read_launch_events, read_lines
from launch.forecast import forecast
from launch.job import ResolvedJob, read_job, read_save_stalls_s
from launch.judge import load_bad_nodes

JOBS = "jobs.jsonl"
RESTART_S = 120.0  # where none was measured


def render(job: ResolvedJob) -> str:
    """The script of a resolved job."""
    return slurm.render(job) if job.kind == "slurm" else local.render(job)


def submit(job: ResolvedJob) -> list[dict[str, Any]]:
    """Submit a resolved job: check its config, keep code and config, then ask for the machines. Returns the records of the
    jobs, which are more than one for a chain. Raises UserError; there is then no job."""
    check_place(job)
    job.launch.mkdir(parents=True, exist_ok=True)
    with lock_folder(job.launch):
        refuse_second(job)
        notes = snapshot.take_code(job)
        resolved, said = snapshot.check_config(job, job.launch / "code")
        job = snapshot.write_config(job, resolved)
        for note in notes + said:
            print(f"note    {note}", file=sys.stderr)
        return send(job)


def resume(run: Path) -> list[dict[str, Any]]:
    """Submit a run again as it was, with the code and config that it has kept."""
    job = read_job(run / "launch" / "job.json")
    check_place(job)
    with lock_folder(job.launch):
        refuse_second(job)
        return send(job)


def check_place(job: ResolvedJob) -> None:
    if not os.path.isdir(job.working_directory):
        raise UserError(f"working_directory: {job.working_directory}: no such folder")
    if job.kind == "slurm":
        slurm.check_sbatch()
    else:
        local.check_start(job)


def refuse_second(job: ResolvedJob) -> None:
    """Raises UserError where the run has a job already, or that cannot be known."""
    try:
        active = find_active(job, read_records(Path(job.run)))
    except slurm.ControllerAway as error:
        raise UserError(
            f"{job.run}: whether a job of this run is there already is not known: {error}. Try again"
        ) from None
    for job_id, state in active.items():
        raise UserError(
            f"{job.run}: job {job_id} of this run is {state.lower()}. Wait for it, or end it first: "
            f"python -m launch cancel {shlex.quote(job.run)}"
        )


def read_records(run: Path) -> list[dict[str, Any]]:
    """What was submitted for a run, in that order. `job_id` is null where a submission was cut short."""
    found: dict[str, dict[str, Any]] = {}
    for record in read_lines(run / "launch" / JOBS):
        found[record.get("token", str(len(found)))] = record
    return [record for record in found.values() if not record.get("refused")]


def find_active(job: ResolvedJob, records: list[dict[str, Any]]) -> dict[str, str]:
    """The run's jobs that have not ended: job -> state. Raises ControllerAway."""
    active = {}
    own = slurm.list_jobs() if any(record["backend"] == "slurm" for record in records) else []
    for record in records:
        if record["backend"] == "slurm":
            for one in own:
                if one.job_id == record["job_id"] or (record["job_id"] is None and record["token"] in one.command):
                    active[one.job_id] = one.state
        elif any(alive is not False for alive in local.find_alive(job, record.get("processes", {})).values()):
            active[record["job_id"]] = "running"
    return active


def send(job: ResolvedJob) -> list[dict[str, Any]]:
    """Write what the supervisors need, then start them or ask Slurm to. The caller holds the lock of RUN/launch."""
    launch, run = job.launch, Path(job.run)
    for folder in ("logs", "submissions"):
        (launch / folder).mkdir(parents=True, exist_ok=True)
    for name in (launch / "stopped", run / "STOP"):
        name.unlink(missing_ok=True)
    make_secret(launch)
    write_json_atomic(launch / "job.json", job.model_dump())  # with all nodes: one that is mended may be used again
    job = exclude_bad_nodes(job)
    script = launch / f"{job.name}.{'sbatch' if job.kind == 'slurm' else 'sh'}"
    write_atomic(script, render(job).encode())
    return send_slurm(job, script) if job.kind == "slurm" else [send_processes(job, script)]


def make_secret(launch: Path) -> None:
    """The key of the supervisors' heartbeats, which nobody else may read."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(launch / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")


def exclude_bad_nodes(job: ResolvedJob) -> ResolvedJob:
    """The job without the nodes that are remembered as bad."""
    bad = sorted(load_bad_nodes(job.bad_nodes))
    if not bad:
        return job
    if job.kind == "slurm":
        print(f"note    without {', '.join(bad)}: {job.bad_nodes} remembers why", file=sys.stderr)
        return job.model_copy(update={"exclude": join_nodes(job.exclude, bad)})
    hosts = [host for host in job.hosts if local.node_name(host) not in bad]
    if len(hosts) < job.nodes + job.spare_nodes:
        raise UserError(
            f"hosts: without {', '.join(bad)} ({job.bad_nodes}) they are too few. Mend them, or take them out there"
        )
    return job.model_copy(update={"hosts": hosts})


def join_nodes(given: str | None, more: Iterable[str]) -> str:
    """A list of nodes as Slurm takes it: what was given, then those of `more` that are not in it by name."""
    names = given.split(",") if given else []
    return ",".join(dict.fromkeys([*names, *more]))


def send_slurm(job: ResolvedJob, script: Path) -> list[dict[str, Any]]:
    """The jobs of a chain, each to begin when the one before has ended."""
    records: list[dict[str, Any]] = []
    for _ in range(job.chain):
        after = [f"afterany:{records[-1]['job_id']}"] if records else []
        try:
            records.append(send_one(job, script, after))
        except UserError as error:
            if records:
                with contextlib.suppress(UserError):
                    slurm.cancel([record["job_id"] for record in records])
                raise UserError(f"{error}. The jobs of the chain before it were cancelled") from None
            raise
    return records


def send_one(
    job: ResolvedJob,
    script: Path,
    dependencies: list[str],
    options: list[str] | None = None,
    token: str | None = None,
    follows: str | None = None,
) -> dict[str, Any]:
    """One submission to Slurm, on record before it is sent: whatever happens in between, the job is found again.

    With the `token` of a submission that was made before, its job is returned.
    """
    dependencies = dependencies + (["singleton"] if job.singleton else [])
    if dependencies:
        options = [*(options or []), f"--dependency={','.join(dependencies)}"]
    record = begin_record(job, script) | {"log": f"{job.launch}/logs/job-%j.log"}
    if token:
        record["token"] = token
        found = slurm.find_submitted(script, token, time.monotonic() + 30)
        if found:
            return record | {"job_id": found}
    append_json_line(job.launch / JOBS, record)
    try:
        job_id = slurm.submit_script(script, record["token"], *(options or []))
    except slurm.Unknown:
        raise
    except UserError as error:
        append_json_line(job.launch / JOBS, record | {"refused": str(error)})
        raise
    record |= {"job_id": job_id, "log": record["log"].replace("%j", job_id)}
    append_json_line(job.launch / JOBS, record)
    append_event(job.run, "submitted", backend="slurm", job_id=job_id, **({"follows": follows} if follows else {}))
    return record


def begin_record(job: ResolvedJob, script: Path) -> dict[str, Any]:
    facts = {"time": time.time(), "backend": job.kind, "job_id": None, "token": secrets.token_hex(6)}
    return facts | {"script": str(script), "command": shlex.join(sys.argv)}


def send_processes(job: ResolvedJob, script: Path) -> dict[str, Any]:
    record = begin_record(job, script)
    record |= {"job_id": f"{job.kind}-{record['token']}", "log": str(job.launch / "logs")}
    append_event(job.run, "submitted", backend=job.kind, job_id=record["job_id"])
    record["processes"] = local.start(job, script, record["job_id"])
    append_json_line(job.launch / JOBS, record)
    return record


def describe(run: Path, records: list[dict[str, Any]]) -> str:
    """What `submit` prints."""
    ids, near = [record["job_id"] for record in records], os.path.relpath(run)
    lines = [f"job     {ids[0]}" + (f", then {', '.join(ids[1:])}" if ids[1:] else "")]
    lines += [f"run     {run}", f"script  {records[0]['script']}", f"logs    {run / 'launch' / 'logs'}"]
    lines += [f"next    python -m launch status {shlex.quote(str(run) if near.startswith('..') else near)}"]
    return "\n".join(lines)


def plan(job: ResolvedJob) -> str:
    """The dry run of a resolved job: all that `submit` would do, and what is known of how it would go."""
    lines = [
        f"run          {job.run}",
        f"ranks        {job.nodes * job.gpus_per_node} on {job.nodes} nodes x {job.gpus_per_node} GPUs",
    ]
    if job.spare_nodes:
        lines[-1] += f", {job.spare_nodes} spare"
    if job.kind == "slurm":
        nodes = job.nodes + job.spare_nodes
        hours = nodes * job.gpus_per_node * job.time_limit_min / 60
        lines.append(
            f"time limit   {job.time_limit_min} min a job, {job.chain} job(s); asked to save {job.save_before_end_s} s before it"
        )
        lines.append(
            f"GPU-hours    {hours:,.1f} a job at most, {hours * job.chain:,.1f} in all, restarts after requeues not counted"
        )
    else:
        lines.append(f"hosts        {', '.join(job.hosts)}")
    excluded = exclude_bad_nodes(job)
    if job.kind == "slurm" and excluded.exclude:
        lines.append(f"without      {excluded.exclude}")
    lines.append(f"each rank    {shlex.join(snapshot.build_command(job))}")
    lines.append(
        "environment  "
        + (" ".join(f"{name}={shlex.quote(text)}" for name, text in job.environment.items()) or "as it is")
    )
    lines.append(f"config       {check_plan(job)}")
    lines.append(f"goodput      {forecast_goodput(job)}")
    script = render(excluded)
    if job.kind == "slurm":
        lines.append(f"start        {slurm.estimate_start(script)}")
        lines += [
            "directives",
            *[f"  {line.removeprefix('#SBATCH ')}" for line in script.splitlines() if line.startswith("#SBATCH")],
        ]
    return "\n".join([*lines, "", script])


def check_plan(job: ResolvedJob) -> str:
    """What the trainer's check says of the run config, with the working directory's own code."""
    if job.config is None:
        return "none: the command is not ours"
    try:
        resolved, said = snapshot.check_config(job, None)
    except UserError as error:
        return f"would be refused: {error}"
    return "; ".join([*(["checked, no mistake found"] if resolved is not None else []), *said])


def forecast_goodput(job: ResolvedJob) -> str:
    """The share of the time that would be productive, from what the run has measured so far and `node_mtbf_h`."""
    run = Path(job.run)
    stalls_s, step_s = (
        read_save_stalls_s(run),
        [
            line["time/step_s"]
            for line in read_lines(run / "metrics.jsonl")
            if isinstance(line.get("time/step_s"), float)
        ],
    )
    saved = [event["step"] for event in read_lines(run / "events.jsonl") if event.get("event") == "save"]
    if not stalls_s or not step_s or len(saved) < 2:
        return "not known before the run has saved twice"
    every_s = max(1, saved[-1] - saved[-2]) * statistics.median(step_s[-100:])
    restarts_s = measure_restarts_s(run)
    found = forecast(
        job.nodes,
        job.node_mtbf_h,
        job.node_silent_s + job.heartbeat_s,
        statistics.mean(restarts_s) if restarts_s else RESTART_S,
        statistics.median(stalls_s[-5:]),
        every_s,
        spares=job.spare_nodes,
    )
    measured = (
        f"restarts of {statistics.mean(restarts_s):.0f} s as measured"
        if restarts_s
        else f"restarts of {RESTART_S:.0f} s"
    )
    return (
        f"{100 * found.goodput:.1f}% expected, with a failure of each node in {job.node_mtbf_h:g} h (node_mtbf_h), saves of "
        f"{statistics.median(stalls_s[-5:]):.1f} s each {every_s:.0f} s as measured, {measured}, and no queue"
    )


def measure_restarts_s(run: Path) -> list[float]:
    """How long it took from each noticed fault of the run to its next step."""
    found, since = [], None
    for event in read_launch_events(run):
        if event["event"] == "fault" and since is None:
            since = event["time"]
        elif event["event"] == "training" and since is not None:
            found.append(event["time"] - since)
            since = None
    return found
