"""Slurm arrays: tasks that share nothing but a folder, each a job of its own, and a last job when all have succeeded.

`python -m data_tools build ... --task K/N` is such a task, and `python -m data_tools finish OUT` such a last job.
"""

import contextlib
import shlex
import subprocess

from data_tools.errors import UserError
from launch.job import TASK, ArrayConfig
from launch.slurm import common_directives, log_stem, prepare_submission, render_head, render_setup, submit_script

SCANCEL_ANSWER_S = 60


def render(job: ArrayConfig, command: list[str]) -> str:
    """Both scripts, one after the other; the first ends before the second begins. Pure: values in, text out."""
    return "\n".join([render_array(job, command), *([render_then(job)] if job.then else [])])


def render_array(job: ArrayConfig, command: list[str]) -> str:
    """The sbatch script of which Slurm runs a copy for each task."""
    options = {
        "job-name": job.name,
        "array": f"1-{job.tasks}" + (f"%{job.max_running}" if job.max_running else ""),
        **_size(job, job.cpus_per_task),
        **common_directives(job, f"{log_stem(job)}-%A_%a.log"),
    }
    parts = [
        *render_head(f"An array of {job.tasks} tasks", options),
        "",
        "task=$SLURM_ARRAY_TASK_ID",
        *_render_run(job, " ".join(quote_task(word) for word in command)),
    ]
    return "\n".join(parts) + "\n"


def render_then(job: ArrayConfig) -> str:
    """The sbatch script of the last job, to be submitted with --dependency=afterok:ARRAYID."""
    options = {
        "job-name": f"{job.name}-then",
        "kill-on-invalid-dep": "yes",
        **_size(job, 1),
        **common_directives(job, f"{log_stem(job)}-then-%j.log"),
    }
    parts = [
        *render_head(f"After all tasks of {job.name}: sbatch --dependency=afterok:ARRAYID", options),
        *_render_run(job, shlex.join(job.then)),
    ]
    return "\n".join(parts) + "\n"


def _size(job: ArrayConfig, cpus: int) -> dict[str, object]:
    return {
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": cpus,
        "mem": None if job.memory_gib is None else f"{job.memory_gib}G",
        "time": job.time_limit_min,
    }


def _render_run(job: ArrayConfig, words: str) -> list[str]:
    """The command takes the place of this shell, so that Slurm's signals reach it and its exit code is the task's."""
    return [
        f"command=({words})",
        *render_setup(job),
        "",
        "export PYTHONUNBUFFERED=1 # the last lines of a task that is killed are in its log",
        'exec "${command[@]}" </dev/null',
    ]


def quote_task(word: str) -> str:
    """Quote a word for the shell, but for {task}, which becomes the number of the task."""
    return '"$task"'.join(shlex.quote(part) if part else "" for part in word.split(TASK)) or "''"


def submit(job: ArrayConfig, command: list[str]) -> None:
    """Submit the array and the job after it, and print their numbers, scripts and logs.

    Raises UserError if one is refused; there is then neither.
    """
    stem = prepare_submission(job)
    array = submit_script(render_array(job, command), stem)
    last = None
    if job.then:
        last_stem = stem.with_name(f"{stem.name}-then")
        try:
            last = submit_script(render_then(job), last_stem, f"--dependency=afterok:{array}")
        except BaseException as error:
            told = cancel(array)
            if isinstance(error, UserError):
                raise UserError(f"then: {error}. {told}") from None
            raise
    print(f"job     {array}, {job.tasks} tasks")
    print(f"script  {stem}-{array}.sbatch")
    print(f"logs    {stem}-{array}_TASK.log")
    if last:
        print(f"then    {last}, when all tasks have succeeded")
        print(f"script  {last_stem}-{last}.sbatch")
        print(f"log     {last_stem}-{last}.log")


def cancel(job_id: str) -> str:
    """Cancel a job that is to have no successor, and tell what came of it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", job_id], check=True, capture_output=True, timeout=SCANCEL_ANSWER_S)
        return f"The array, job {job_id}, was cancelled"
    return f"The array, job {job_id}, is queued and could not be cancelled: use scancel"
