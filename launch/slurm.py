"""Slurm: a job as an sbatch script, which is a pure function of the job file, and its submission."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data_tools.errors import UserError
from launch.job import JobConfig, SlurmConfig, check_run_config

SBATCH_ANSWER_S = 120  # a controller that does not answer must not hold the user for ever

# The part of the script that is the same for every job, before the user's setup. All values come from variables.
_PREPARE = r"""
restarts=${SLURM_RESTART_COUNT:-0}
logs=$(realpath -m -- "$log_stem-$SLURM_JOB_ID") # one log a rank
ending=$logs/start-$restarts # + .step, .first: what the ranks tell this script
mkdir -p -- "$logs"

log() { printf '%(%FT%T%z)T %s: %s\n' -1 "$SLURMD_NODENAME" "$*"; }

# Slurm sends USR1 to this shell when it is time to save. Pass it on to the ranks as SIGTERM, through the controller:
# srun itself answers SIGTERM by killing the ranks. In the background, because scancel waits for nodes that are gone.
ask_ranks_to_save() {
  signalled=1
  log "it is time to save: sending SIGTERM to the ranks"
  if [[ -e $ending.step ]]; then
    timeout 60 scancel --signal=TERM "$SLURM_JOB_ID.$(<"$ending.step")" &
  fi
}
trap ask_ranks_to_save USR1
# When Slurm itself ends the job (scancel, the time limit) it sends SIGTERM to the ranks and to this shell. Stay to
# hear how they end.
trap 'signalled=1; log "Slurm is ending the job"' TERM
"""

# The same, after it.
_RUN = r"""
# Ranks meet on the first node, where this script and rank 0 run. The kernel names a free port; in the seconds before
# rank 0 listens another program could take it. Rank 0 then fails and the job ends FAILED, it does not hang.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1 # the last lines of a rank that is killed are in its log

# What srun starts for each rank: the command, with its place under the names that torchrun uses. The first rank that
# does not finish says how the job ended, for what others do after it may be its consequence. It was interrupted if it
# exits with 85 ("I have saved") or dies of Slurm's SIGTERM, which came before it could listen or on its way out. srun
# must not see that as a failure, or it would kill the ranks that are still saving.
run_rank() {
  local code=0 told=
  trap told=1 TERM # Slurm signals this shell too; it waits for the command
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
  [[ $RANK != 0 ]] || echo "$SLURM_STEP_ID" >"$ending.step"
  "$@" || code=$?
  [[ ! $told || $code != 143 ]] || code=85
  if ((code != 0)); then
    (set -o noclobber && echo "$code $RANK $SLURMD_NODENAME" >"$ending.first") 2>/dev/null
  fi
  if ((code == 85)) && [[ -s $ending.first ]]; then code=0; fi
  exit "$code"
}

log "job $SLURM_JOB_ID, restart $restarts, on $SLURM_JOB_NODELIST; ranks meet at $MASTER_ADDR:$MASTER_PORT"
export ending
srun --export=ALL --cpus-per-task="$cpus_per_gpu" --distribution=block --kill-on-bad-exit=1 --wait=60 \
  --open-mode=append --output="$logs/rank-%4t-%N.log" \
  bash -c "$(declare -f run_rank); run_rank \"\$@\"" run_rank "${command[@]}" </dev/null &
step=$!
signalled=1
while [[ $signalled ]]; do # wait also returns for a signal; then wait again
  signalled=
  code=0
  wait "$step" || code=$?
done

# srun tells the highest code, which is 137 where it had to kill the others.
if [[ -s $ending.first ]]; then
  read -r code rank host <"$ending.first"
  log "rank $rank on $host ended first, with exit code $code"
fi
if ((code == 0)); then
  log "finished"
fi
if ((code != 85)); then
  exit "$code"
fi

# Interrupted: queue this job again. Not a job that was cancelled, which requeueing would bring back.
trap : TERM # Slurm ends this start as soon as the job is queued again
if ((restarts >= max_requeues)); then
  log "interrupted; not queued again after $restarts restarts of at most $max_requeues. Submit it again to go on"
  exit 85
fi
for attempt in 1 2 3 4 5; do # the controller may be away for a moment
  if state=$(timeout 60 squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r'); then
    case $state in
      RUNNING* | *TimeLimit) ;;
      *) log "interrupted; not queued again, because Slurm is ending the job: $state"; exit 85 ;;
    esac
    if timeout 60 scontrol requeue "$SLURM_JOB_ID"; then
      log "interrupted; queued again"
      exit 85
    fi
  fi
  log "no answer from the controller, attempt $attempt of 5"
  sleep 30
done
log "interrupted; could not be queued again. Submit it again to go on"
exit 85
"""


def render(job: JobConfig, command: list[str]) -> str:
    """The sbatch script that runs `command` once for each GPU of the job. Pure: values in, text out."""
    parts = [
        *render_head(f"{job.nodes} x {job.gpus_per_node} GPUs, one process a GPU", directives(job)),
        "",
        "# From the job file.",
        f"log_stem={shlex.quote(log_stem(job))}",
        f"max_requeues={job.max_requeues if job.requeue else 0}",
        f"cpus_per_gpu={job.cpus_per_gpu}",
        f"python={shlex.quote(job.python)}",
        f"command=({shlex.join(command)})",
        _PREPARE.rstrip(),
        *render_setup(job),
    ]
    return "\n".join(parts) + "\n" + _RUN


def render_head(what: str, options: dict[str, object]) -> list[str]:
    """The lines of a script before its own: what it is, the options of sbatch ("" for one without a value)."""
    given = [(option, str(value)) for option, value in options.items() if value is not None]
    return [
        "#!/usr/bin/env bash",
        f"# {what}. Written by `python -m launch`; see docs/launch.md.",
        *[f"#SBATCH --{option}{'=' * bool(value)}{quote_directive(value)}" for option, value in given],
        "set -euo pipefail",
    ]


def render_setup(job: SlurmConfig) -> list[str]:
    """The lines of `setup` and `environment`."""
    parts = []
    if job.setup:
        parts += ["", "# Setup from the job file; without -u, for activation scripts read unset variables."]
        parts += ["set +u", *job.setup, "set -u"]
    if job.environment:
        parts += ["", *[f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]]
    return parts


def directives(job: JobConfig) -> dict[str, object]:
    """The options of sbatch with their values; None for one that is left out."""
    return {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gpus-per-node": job.gpus_per_node,  # all GPUs of a node visible to each of its ranks: the local rank picks
        "cpus-per-task": job.cpus_per_gpu,
        "mem": None if job.memory_gib_per_node is None else f"{job.memory_gib_per_node}G",
        "time": job.time_limit_min,
        "signal": f"B:USR1@{job.save_before_end_s}" if job.save_before_end_s else None,
        **common_directives(job, f"{log_stem(job)}-%j.log"),
    }


def common_directives(job: SlurmConfig, log: str) -> dict[str, object]:
    """Those that every kind of job has; `log` as sbatch takes it, with its `%` patterns."""
    return {
        "requeue" if job.requeue else "no-requeue": "",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "exclude": job.exclude,
        "reservation": job.reservation,
        "chdir": job.working_directory,
        "output": log,
        "open-mode": "append",
        **job.extra_sbatch,
    }


def log_stem(job: SlurmConfig) -> str:
    """What the names of all files of the job begin with; "-JOBID" follows."""
    return os.path.join(job.output, job.name)


def quote_directive(value: str) -> str:
    """Quote for an #SBATCH line, whose rules are not the shell's: a backslash escapes within any quotes."""
    if re.fullmatch(r"[A-Za-z0-9@%+=:,./_\[\]-]*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def submit(job: JobConfig, command: list[str]) -> None:
    """Submit the job and print its number and where its script and logs are. Raises UserError if it is refused."""
    stem = prepare_submission(job)
    check_run_config(job, Path(job.working_directory or "."))
    job_id = submit_script(render(job, command), stem)
    print(f"job     {job_id}")
    print(f"script  {stem}-{job_id}.sbatch")
    print(f"log     {stem}-{job_id}.log, and one for each rank in {stem}-{job_id}/")


def prepare_submission(job: SlurmConfig) -> Path:
    """What the names of the job's files begin with, as an absolute path. Raises UserError where nothing can be
    submitted."""
    base = Path(job.working_directory or ".")
    if not base.is_dir():
        raise UserError(f"working_directory: {base}: no such folder")
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit on a login node of a SLURM cluster, or see the script by render")
    return Path(os.path.abspath(base / log_stem(job)))


def submit_script(script: str, stem: Path, *options: str) -> str:
    """Submit a script, with more options of sbatch, and keep it as STEM-JOBID.sbatch; return the job's number."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    # Written before the job exists, so that a full disk cannot leave a job without its script.
    descriptor, temporary = tempfile.mkstemp(prefix=f"{stem.name}-", suffix=".tmp", dir=stem.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(script)
        job_id = run_sbatch(temporary, *options)
        os.replace(temporary, f"{stem}-{job_id}.sbatch")
    finally:
        Path(temporary).unlink(missing_ok=True)
    return job_id


def run_sbatch(script: str, *options: str) -> str:
    """Give the script to sbatch and return the job's number. Raises UserError with sbatch's own words."""
    # Within another job, the variables of that job would be taken as options for this one.
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_") or name in kept}
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", *options, script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SBATCH_ANSWER_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch gave no answer in {SBATCH_ANSWER_S} s. Look with squeue whether the job is queued"
        ) from None
    lines = [re.sub(r"^sbatch: (error: )?", "", line) for line in result.stderr.splitlines()]
    if result.returncode:
        raise UserError("sbatch refused the job: " + "; ".join(lines or [f"exit code {result.returncode}"]))
    for line in lines:
        print(f"sbatch: {line}", file=sys.stderr)
    return result.stdout.strip().split(";")[0]  # "12" or "12;cluster"
