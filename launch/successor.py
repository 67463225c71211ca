"""What follows a job that ends before its run is done: the same job queued again, the next one of its chain, or nothing.

Success is RUN/done.json, never an exit code. Called by the leader of the supervisors, from within the job.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from launch import slurm, submit
from launch.events import append_event, read_launch_events
from launch.job import ResolvedJob
from launch.judge import load_bad_nodes

EXIT_GIVE_UP = 87
ATTEMPTS, PAUSE_S = 8, 10.0  # for a controller that is away for a moment


def continue_job(job: ResolvedJob, reason: str, exclude: list[str]) -> str | None:
    """Have the run go on after this job, for `reason`, without the nodes `exclude`. Returns how: "requeue" (this job again),
    "resubmit" (the next job of the chain, or a new one), or None: not at all, and the event `continue` says why.

    Called twice, or by two leaders, it has the effect of one call: a job is queued again only while it is in the same start,
    and of two new jobs that follow the same start only one runs. What it asks for may end the caller, so all else has to be on
    record before. Waits for an absent controller for at most about two minutes.
    """
    job_id, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if job.kind != "slurm" or job_id is None or reason in ("finished", "user", "cancel", "stop_file"):
        return None
    if (Path(job.run) / "done.json").exists():
        return None
    why_not = find_reason_to_stop(job, f"{job_id}.{restarts}")
    action = None if why_not else choose_action(job, job_id, exclude)
    append_event(
        job.run,
        "continue",
        job_id=job_id,
        start=f"{job_id}.{restarts}",
        action=action,
        reason=why_not or reason,
        excluded=exclude,
        checkpoint=newest_checkpoint(Path(job.run)),
    )
    here = job.launch / "jobs" / f"{job_id}-{restarts}"
    here.mkdir(parents=True, exist_ok=True)
    if why_not:  # no job of a chain is to follow
        (job.launch / "stopped").write_text(f"{EXIT_GIVE_UP} {job_id} {why_not}\n")
    if action is None:
        return None
    (here / "continuing").touch()  # the batch script waits for it
    try:
        done = (requeue if action == "requeue" else resubmit)(job, job_id, restarts, exclude)
        if done:
            (here / "continued").write_text(f"{done}\n")
        return done
    finally:
        (here / "continuing").unlink(missing_ok=True)


def find_reason_to_stop(job: ResolvedJob, start: str) -> str:
    """Why nothing more may follow after this start of a job, or ""."""
    lives: dict[str, Any] = {}  # start -> newest checkpoint at its end, since a person has submitted the run
    for event in read_launch_events(job.run):
        if event["event"] == "submitted" and not event.get("follows"):
            lives = {}
        elif event["event"] == "continue":
            lives[event["start"]] = event["checkpoint"]
    lives.pop(start, None)
    if len(lives) >= job.max_restarts:
        return f"{len(lives)} restarts, and max_restarts={job.max_restarts}"
    newest, idle = newest_checkpoint(Path(job.run)), 1
    for step in reversed(lives.values()):
        if step != newest:
            break
        idle += 1
    if idle >= job.max_lives_without_checkpoint:
        at = f"that of step {newest}" if newest is not None else "none"
        return f"{idle} jobs in a row have made no new checkpoint; the newest is {at}"
    return ""


def newest_checkpoint(run: Path) -> int | None:
    """The step of the newest checkpoint of a run; None where it has none."""
    steps = [path.name[5:] for path in (run / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def choose_action(job: ResolvedJob, job_id: str, exclude: list[str]) -> str | None:
    """A chain goes on with its next job. Otherwise the job is queued again, but for two cases in which a new job takes its place:
    the cluster cancels what it preempts, and so what it has queued again; and nodes are to be left out. Slurm takes nodes that
    fail out of a job, and a job that is queued again after that (22.05) may get nodes without GPUs to start a step on."""
    if job.chain > 1:
        return "resubmit" if find_next(job) else None
    if not job.requeue:
        return None
    if exclude and shutil.which("sbatch"):
        return "resubmit"
    found = ask(slurm.query_job, job_id) if shutil.which("scontrol") else None
    if found and found.preempted and slurm.preempt_mode(job.partition) == "CANCEL":
        return "resubmit"
    return "requeue"


def find_next(job: ResolvedJob) -> list[str]:
    """The jobs of the run that wait, in the order of their submission."""
    ids = [record["job_id"] for record in submit.read_records(Path(job.run))]
    waiting = [one.job_id for one in ask(slurm.list_jobs) if one.state == "PENDING"]
    return [job_id for job_id in ids if job_id in waiting]


def ask(function: Callable[..., Any], *arguments: str) -> Any:
    """An answer of the controller, which may be away for a moment. Raises UserError if it does not come."""
    for attempt in range(ATTEMPTS):
        try:
            return function(*arguments)
        except slurm.ControllerAway:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(PAUSE_S)


def requeue(job: ResolvedJob, job_id: str, restarts: int, exclude: list[str]) -> str | None:
    """Queue this job again. Slurm ends it at once."""
    if shutil.which("scontrol") is None:  # in a container: the batch script asks for it
        (job.launch / "jobs" / f"{job_id}-{restarts}" / "requeue").touch()
        return "requeue"
    try:
        found = ask(slurm.query_job, job_id)
        if found is None or found.restarts != restarts:
            return "requeue"  # it is queued again already
        if found.state != "RUNNING" and not found.preempted and found.reason != "TimeLimit":
            return fail(job, f"Slurm is ending the job: {found.state} {found.reason}".strip())
        ask(slurm.call, "scontrol", "requeue", job_id)
    except UserError as error:
        return fail(job, str(error))
    return "requeue"


def resubmit(job: ResolvedJob, job_id: str, restarts: int, exclude: list[str]) -> str | None:
    """The next job of the chain, or a new one that begins when this one has ended."""
    try:
        if job.chain > 1:
            leave_out(job, find_next(job), exclude)
            return "resubmit"
        nodes = all_excluded(job, exclude)
        options = [f"--exclude={nodes}"] if nodes else []
        token = f"after-{job_id}-{restarts}"
        submit.send_one(job, job.launch / f"{job.name}.sbatch", [f"afterany:{job_id}"], options, token, follows=job_id)
    except UserError as error:
        return fail(job, str(error))
    return "resubmit"


def leave_out(job: ResolvedJob, job_ids: list[str], exclude: list[str]) -> None:
    """Have waiting jobs start without these nodes."""
    nodes = all_excluded(job, exclude)
    for job_id in job_ids if exclude else []:
        try:
            ask(slurm.call, "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}")
        except UserError as error:
            append_event(job.run, "not_excluded", job_id=job_id, nodes=exclude, reason=str(error))


def all_excluded(job: ResolvedJob, exclude: list[str]) -> str:
    """Those of the job file, those remembered as bad, and these."""
    try:
        bad = sorted(load_bad_nodes(job.bad_nodes))
    except (UserError, OSError):  # of no use, but no reason to end a run
        bad = []
    return submit.join_nodes(job.exclude, [*bad, *exclude])


def fail(job: ResolvedJob, why: str) -> None:
    """Leave on record why nothing follows."""
    append_event(job.run, "not_continued", reason=why)
    return None
