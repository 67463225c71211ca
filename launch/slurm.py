"""Slurm: a job as an sbatch script, which is a pure function of the job; its submission; questions to the controller.

Nothing here waits for long: the controller may be away, and a program of Slurm's that talks to a dead node never comes back.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from launch.job import ContainerConfig, ResolvedJob, SlurmConfig

SBATCH_ANSWER_S = 120  # a controller that does not answer must not hold the user for ever
ANSWER_S = 15  # for questions
PATIENCE_S = 300.0  # for a controller that went away while a job was submitted
AWAY = (
    "Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were transmitted",
    "Connection timed out", "Transport endpoint", "communication connection failure", "Unexpected message received",
    "Protocol authentication error", "Slurm backup controller in standby mode", "Slurm temporarily unable to accept job",
    "Communication shutdown failure",
    "Could not establish a configuration source",
)  # fmt: skip

# Before the user's setup. All values come from variables.
_PREPARE = r"""
submission=${1:-} # which submission this is; by hand: none
restarts=${SLURM_RESTART_COUNT:-0}
here=$launch/jobs/$SLURM_JOB_ID-$restarts # what this start of the job and its supervisors tell each other
mkdir -p -- "$here" "$launch/logs" "$launch/submissions"

log() { printf '%(%FT%T%z)T %s: %s\n' -1 "${SLURMD_NODENAME:-?}" "$*"; }

# One submission is one job. Should a controller that went away have taken it twice, the second to start ends here.
if [[ $submission ]]; then
  claim=$launch/submissions/$submission
  (set -o noclobber && echo "$SLURM_JOB_ID" >"$claim") 2>/dev/null || :
  if [[ $(<"$claim") != "$SLURM_JOB_ID" ]]; then
    log "job $SLURM_JOB_ID: this submission runs as job $(<"$claim") already; nothing to do"
    exit 0
  fi
fi
# A job of a chain may come when the run is done, or has been stopped.
if [[ $run/done.json -nt $launch/job.json ]]; then
  log "job $SLURM_JOB_ID: the run is done; nothing to do"
  exit 0
fi
if [[ -s $launch/stopped ]]; then # "CODE JOB REASON"
  read -r code who reason <"$launch/stopped"
  if [[ $who != "$SLURM_JOB_ID" ]]; then
    log "job $SLURM_JOB_ID: the run was stopped: $reason. python -m launch resume goes on"
    exit "$code"
  fi
  rm -f -- "$launch/stopped" # by this job, which somebody has queued again
fi
"""

# The same, after it.
_RUN = r"""
# Slurm sends USR1 to this shell when it is time to save, and TERM when it ends the job. The supervisors read of that in a file:
# srun would pass USR1 on to the ranks, too, which it kills before they can listen, and TERM makes srun kill them all.
trap 'log "it is time to save"; echo time_limit >"$here/notice"' USR1
trap 'log "Slurm is ending the job"; [[ -e $here/notice ]] || echo cancel >"$here/notice"' TERM

# One supervisor a node. They outlive each other: none is ended because another one or its node has failed.
log "job $SLURM_JOB_ID, restart $restarts, on $SLURM_JOB_NODELIST"
srun --no-kill --kill-on-bad-exit=0 --wait=0 --overlap --nodes="$supervisors" --ntasks="$supervisors" \
  --ntasks-per-node=1 --cpus-per-task="$cpus" --export=ALL --open-mode=append \
  --output="$launch/logs/%N.supervisor.log" "${in_container[@]}" \
  "$python" -m launch agent "$launch/job.json" </dev/null &
step=$!

# srun waits for nodes that are dead. What counts is what the supervisors say: the one that leads writes the job's exit code
# into the file `end`. Then srun has some seconds to end; longer only while they ask Slurm for what follows this job.
waited=0 # in half seconds
while kill -0 "$step" 2>/dev/null; do
  sleep 0.5 &
  wait $! || : # a signal ends the wait, so that it is passed on at once
  if [[ -s $here/end ]]; then
    waited=$((waited + 1))
    if ((waited > 400)) || { ((waited > 20)) && [[ ! -e $here/continuing ]]; }; then break; fi
  fi
done
if [[ -s $here/end ]]; then
  read -r code <"$here/end"
else
  code=0
  wait "$step" || code=$?
  log "the supervisors ended without a word; srun's exit code is $code. See $launch/logs/*.supervisor.log"
  ((code != 0)) || code=1 # success has to be said
fi
log "the job ends with exit code $code"

# Supervisors in a container may have no programs of Slurm's: then it is asked here to queue the job again.
if [[ -e $here/requeue ]]; then
  trap : TERM # Slurm ends this start as soon as the job is queued again
  for attempt in 1 2 3 4 5; do
    if timeout 60 scontrol requeue "$SLURM_JOB_ID"; then
      log "queued again"
      exit "$code"
    fi
    log "no answer from the controller, attempt $attempt of 5"
    sleep 10
  done
elif ((code != 0)) && [[ ! -s $here/continued && ! -s $launch/stopped ]]; then
  echo "$code $SLURM_JOB_ID job $SLURM_JOB_ID ended with exit code $code" >"$launch/stopped" # no job of a chain is to follow
fi
exit "$code"
"""


def render(job: ResolvedJob) -> str:
    """The sbatch script of a resolved job. Pure: values in, text out."""
    nodes = job.nodes + job.spare_nodes
    spares = f" and {job.spare_nodes} spare" if job.spare_nodes else ""
    what = f"{job.nodes}{spares} x {job.gpus_per_node} GPUs: one supervisor a node, one process a GPU"
    parts = [
        *render_head(what, directives(job)),
        "",
        "# From the job file.",
        f"run={shlex.quote(job.run)}",
        "launch=$run/launch",
        f"python={shlex.quote(job.python)}",
        f"supervisors={nodes}",
        f"cpus={job.cpus_per_gpu * job.gpus_per_node} # of a node",
        f"in_container=({quote_list(enter_container(job))})",
        _PREPARE.rstrip(),
        *render_setup(job),
        *render_code(job),
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


def render_code(job: ResolvedJob) -> list[str]:
    """The lines that have our Python take the code as it was at submission, rather than that of the working directory."""
    # A program of somebody else's may need its own folder on the path.
    safe = "" if job.config is None else " PYTHONSAFEPATH=1"
    return [
        "",
        f"export PYTHONPATH=$launch/code${{PYTHONPATH:+:$PYTHONPATH}}{safe} # the code as it was at submission",
        "export PYTHONUNBUFFERED=1 # the last lines of what is killed are in its log",
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


def quote_list(words: list[str]) -> str:
    """Quote for a list of bash; a comma, too, which would look like a mistake there."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def enter_container(job: ResolvedJob) -> list[str]:
    """The words before the supervisor's command: options of srun for Pyxis, a command for Apptainer."""
    container = job.container
    if container is None:
        return []
    mounts = list_mounts(job, container)
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={job.working_directory}", *container.options]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, "--pwd", job.working_directory, *container.options, container.image]


def list_mounts(job: ResolvedJob, container: ContainerConfig) -> list[str]:
    """What the container sees of the machine: the working directory and the run folder under their own paths, and `mounts`."""
    own = [job.working_directory]
    if not Path(job.run).is_relative_to(job.working_directory):
        own.append(job.run)
    return [*[f"{path}:{path}" for path in own], *container.mounts]


def directives(job: ResolvedJob) -> dict[str, object]:
    """The options of sbatch with their values; None for one that is left out."""
    gpus = f"{job.gpu_type}:{job.gpus_per_node}" if job.gpu_type else job.gpus_per_node
    return {
        "job-name": job.name,
        "nodes": job.nodes + job.spare_nodes,
        "ntasks-per-node": 1,
        # All GPUs of a node are visible to its supervisor, and so to each of its ranks: the local rank picks.
        "gpus-per-node": gpus if job.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if job.gpu_request == "gres" else None,
        "cpus-per-task": job.cpus_per_gpu * job.gpus_per_node,
        "mem": None if job.memory_gib_per_node is None else f"{job.memory_gib_per_node}G",
        "time": job.time_limit_min,
        "signal": f"B:USR1@{job.save_before_end_s}" if job.save_before_end_s else None,
        "no-kill": "",  # a node that fails does not end the job
        "mail-user": job.mail,
        "mail-type": ",".join(job.mail_events) if job.mail else None,
        **common_directives(job, f"{job.launch}/logs/job-%j.log"),
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


def quote_directive(value: str) -> str:
    """Quote for an #SBATCH line, whose rules are not the shell's: a backslash escapes within any quotes."""
    if re.fullmatch(r"[A-Za-z0-9@%+=:,./_\[\]-]*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


class ControllerAway(UserError):
    """No answer from slurmctld: nobody knows whether what was asked for was done."""


class Unknown(UserError):
    """Nobody knows whether a job was submitted."""


def call(*words: str, timeout_s: float = ANSWER_S, text_in: str = "") -> str:
    """What one of Slurm's programs prints. Raises ControllerAway without an answer, UserError with the program's words."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not on PATH: this is no node of a SLURM cluster")
    # Within another job, the variables of that job would be taken as options for this one.
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_") or name in kept}
    try:
        result = subprocess.run(
            words,
            input=text_in,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            # Slurm ends what runs in a job that is queued again: not before it is told which nodes to leave out.
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        )
    except subprocess.TimeoutExpired:
        raise ControllerAway(f"{words[0]}: no answer in {timeout_s:g} s") from None
    lines = [re.sub(rf"^{words[0]}: (error: )?", "", line) for line in result.stderr.splitlines()]
    text = "; ".join(lines or [f"exit code {result.returncode}"])
    if result.returncode and any(sign in text for sign in AWAY):
        raise ControllerAway(f"{words[0]}: {text}")
    if result.returncode:
        raise UserError(f"{words[0]}: {text}")
    if "--test-only" in words:  # answers there
        return text
    for line in lines:
        print(f"{words[0]}: {line}", file=sys.stderr)
    return result.stdout


def check_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit on a login node of a SLURM cluster, or see the script by render")


def submit_script(script: Path, token: str, *options: str, patience_s: float | None = None) -> str:
    """Submit a script, with more options of sbatch, and return the job's number. Raises UserError if it is refused.

    `token` is the script's argument, and names this submission: where the controller goes away in this moment, the queue is
    asked for a job of that script and token before sbatch is tried again, so that none is there twice.
    """
    check_sbatch()
    patience_s = PATIENCE_S if patience_s is None else patience_s
    end_s, told = time.monotonic() + patience_s, False
    while True:
        try:
            answer = call("sbatch", "--parsable", *options, str(script), token, timeout_s=SBATCH_ANSWER_S)
            return answer.strip().split(";")[0]  # "12" or "12;cluster"
        except ControllerAway as error:
            if not told:
                print(f"{error}. Asking again for up to {patience_s:g} s ...", file=sys.stderr, flush=True)
                told = True
            found = find_submitted(script, token, end_s)
            if found:
                return found
            if time.monotonic() > end_s:
                raise Unknown(
                    f"{error}. Whether the job is queued is not known; should it come twice, the second ends at once. "
                    "Look with squeue, or submit again"
                ) from None
        except UserError as error:
            raise UserError(f"sbatch refused the job: {str(error).removeprefix('sbatch: ')}") from None


def find_submitted(script: Path, token: str, end_s: float) -> str | None:
    """The number of the job of this script and token, asked for until the controller answers, twice: what sbatch sent last
    may still be under way. None: there is none, or no answer until `end_s` (monotonic)."""
    answers = 0
    while answers < 2 and time.monotonic() < end_s:
        time.sleep(1.0)
        with contextlib.suppress(ControllerAway):
            for job in list_jobs("--states=all"):
                if token in job.command and str(script) in job.command:
                    return job.job_id
            answers += 1
    return None


def list_jobs(*options: str) -> list["SlurmJob"]:
    """The user's jobs that have not ended, as squeue tells them. Raises ControllerAway."""
    found = []
    for line in call("squeue", "--noheader", "--me", *options, "--format=%i|%T|%r|%N|%S|%o").splitlines():
        job_id, state, reason, nodes, start, command = (line.split("|", 5) + [""] * 5)[:6]
        start = "" if start == "N/A" else start
        found.append(
            SlurmJob(job_id.split("_")[0], state, reason, nodes, start=start, source="squeue", command=command)
        )
    return found


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of a job."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, PREEMPTED, NODE_FAIL, ...
    reason: str = ""
    nodes: str = ""
    exit_code: int | None = None
    restarts: int = 0
    start: str = ""  # as Slurm writes times; of a job that waits: the estimate, or ""
    end: str = ""
    preempted: bool = False
    source: str = "scontrol"
    command: str = ""

    @property
    def active(self) -> bool:
        return self.state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STOPPED",
                              "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SIGNALING", "STAGE_OUT")  # fmt: skip


def query_job(job_id: str, timeout_s: float = ANSWER_S) -> SlurmJob | None:
    """What the controller says of a job, or the accounting where it has forgotten it; None: neither knows it.

    Raises ControllerAway.
    """
    try:
        text = call("scontrol", "--oneliner", "show", "job", job_id, timeout_s=timeout_s)
    except ControllerAway:
        raise
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return query_accounting(job_id, timeout_s)

    def fact(name: str) -> str:
        found = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return "" if found is None or found[1] in ("(null)", "None", "Unknown", "N/A") else found[1]

    code = fact("ExitCode").partition(":")[0]
    return SlurmJob(
        job_id,
        fact("JobState"),
        fact("Reason"),
        fact("NodeList"),
        int(code) if code.isdigit() else None,
        int(fact("Restarts") or 0),
        fact("StartTime"),
        fact("EndTime"),
        bool(fact("PreemptTime")),
    )


def query_accounting(job_id: str, timeout_s: float = ANSWER_S) -> SlurmJob | None:
    """What sacct says of a job that the controller has forgotten; None where it does not know it, or keeps no accounts."""
    form = "--format=State,ExitCode,NodeList,Start,End"
    try:
        text = call(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", form, timeout_s=timeout_s
        )
    except UserError:
        return None
    lines = text.strip().splitlines()
    if not lines:
        return None
    state, code, nodes, start, end = (lines[-1].split("|") + [""] * 5)[:5]
    code = code.partition(":")[0]
    state = state.split()[0] if state.split() else ""  # "CANCELLED by 1000"
    return SlurmJob(job_id, state, "", nodes, int(code) if code.isdigit() else None, 0, start, end, source="sacct")


def node_states(nodes: list[str], timeout_s: float = ANSWER_S) -> dict[str, str]:
    """What Slurm says of nodes: "idle", "down* (Not responding)", ... Empty without an answer."""
    found = {}
    with contextlib.suppress(UserError):
        text = call(
            "sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E", timeout_s=timeout_s
        )
        for line in text.splitlines():
            name, state, reason = (line.split("|", 2) + ["", ""])[:3]
            found[name] = state + (f" ({reason})" if reason not in ("", "none") else "")
    return found


def preempt_mode(partition: str | None = None, timeout_s: float = ANSWER_S) -> str:
    """What the cluster does with jobs of a partition (none: the default one) that have to make room: REQUEUE, CANCEL,
    SUSPEND or OFF; "" without an answer."""
    with contextlib.suppress(UserError):
        text = call("scontrol", "--oneliner", "show", "partition", timeout_s=timeout_s)
        for line in text.splitlines():
            if f"PartitionName={partition} " in line or (partition is None and " Default=YES" in line):
                found = re.search(r"\bPreemptMode=(\S+)", line)
                if found and found[1].split(",")[-1] not in ("", "INHERIT"):
                    return found[1].split(",")[-1].upper()
        found = re.search(
            r"^PreemptMode\s*=\s*(\S+)", call("scontrol", "show", "config", timeout_s=timeout_s), re.MULTILINE
        )
        if found:
            return found[1].split(",")[-1].upper()
    return ""


def estimate_start(script: str) -> str:
    """What `sbatch --test-only` says of a script: when it could start, and where; or why it would be refused."""
    if shutil.which("sbatch") is None:
        return "not known: sbatch is not on PATH"
    try:
        text = call("sbatch", "--test-only", text_in=script)
    except ControllerAway as error:
        return f"not known: {error}"
    except UserError as error:
        return f"would be refused: {str(error).removeprefix('sbatch: ')}"
    return re.sub(r"^Job \d+ ", "", text)


def cancel(job_ids: list[str], timeout_s: float = ANSWER_S) -> None:
    """End jobs now; those that have ended are no mistake. Raises UserError, or ControllerAway."""
    try:
        if job_ids:
            call("scancel", *job_ids, timeout_s=timeout_s)
    except ControllerAway:
        raise
    except UserError as error:
        if "already completing or completed" not in str(error) and "Invalid job id" not in str(error):
            raise
