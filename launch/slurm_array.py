"""Slurm arrays: tasks that share nothing but a folder, each a job of its own, and a last job when all have succeeded.

`python -m data_tools build ... --task K/N` is such a task, and `python -m data_tools finish OUT` such a last job.
"""

import os
import shlex
import tempfile
from pathlib import Path

from data_tools.errors import UserError
from launch import slurm
from launch.job import TASK, ArrayConfig, build_command
from launch.slurm import check_sbatch, common_directives, render_head, render_setup

SCANCEL_ANSWER_S = 60


def render(job: ArrayConfig) -> str:
    """Both scripts, one after the other; the first ends before the second begins. Pure: values in, text out."""
    return "\n".join([render_array(job, build_command(job)), *([render_then(job)] if job.then else [])])


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


def log_stem(job: ArrayConfig) -> str:
    """What the names of all files of the job begin with; "-JOBID" follows."""
    return os.path.join(job.output, job.name)


def submit(job: ArrayConfig) -> None:
    """Submit the array and the job after it, and print their numbers, scripts and logs.

    Raises UserError if one is refused; there is then neither.
    """
    base = Path(job.working_directory or ".")
    if not base.is_dir():
        raise UserError(f"working_directory: {base}: no such folder")
    check_sbatch()
    stem = Path(os.path.abspath(base / log_stem(job)))
    array = submit_text(render_array(job, build_command(job)), stem)
    last = None
    if job.then:
        last_stem = stem.with_name(f"{stem.name}-then")
        try:
            last = submit_text(render_then(job), last_stem, f"--dependency=afterok:{array}")
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


def submit_text(script: str, stem: Path, *options: str) -> str:
    """Submit a script, with more options of sbatch, and keep it as STEM-JOBID.sbatch; return the job's number."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    # Written before the job exists, so that a full disk cannot leave a job without its script.
    descriptor, temporary = tempfile.mkstemp(prefix=f"{stem.name}-", suffix=".tmp", dir=stem.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(script)
        job_id = slurm.submit_script(Path(temporary), "submitted", *options)
        os.replace(temporary, f"{stem}-{job_id}.sbatch")
    finally:
        Path(temporary).unlink(missing_ok=True)
    return job_id


def cancel(job_id: str) -> str:
    """Cancel a job that is to have no successor, and tell what came of it."""
    try:
        slurm.cancel([job_id], SCANCEL_ANSWER_S)
    except UserError:
        return f"The array, job {job_id}, is queued and could not be cancelled: use scancel"
    return f"The array, job {job_id}, was cancelled"
