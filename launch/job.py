"""What a job is: the keys of a job file and of a cluster file, and the command that each rank runs.

`load_job` reads what a user wrote; `resolve_job` makes of it what runs: absolute paths, the run folder, all that depends on
the place; `submit` keeps that as RUN/launch/job.json, which `read_job` gives to the supervisors.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from data_tools.errors import suggest
from launch.events import FOLDER, read_lines
from pretrain.config import ConfigError, ConfigModel, check_config, read_yaml, set_dotted

# Options of sbatch that a script must not set twice, and the key that sets each. None: it would break the script.
_OWNED_OPTIONS = {
    "job-name": "name",
    "time": "time_limit_min",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "reservation": "reservation",
    "output": None,
    "error": None,
    "chdir": "working_directory",
    "open-mode": None,
    "wrap": None,
    "test-only": None,  # `plan` asks for it
    "parsable": None,
}
_OWNED_OPTIONS_OF_RANKS = {
    "nodes": "nodes and spare_nodes",
    "ntasks": None,  # one task a node, which starts the ranks
    "ntasks-per-node": None,
    "gpus": "nodes and gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node and gpu_request",
    "cpus-per-task": "cpus_per_gpu",
    "mem": "memory_gib_per_node",
    "signal": "save_before_end_s",
    "mail-user": "mail",
    "mail-type": "mail_events",
    "dependency": "chain",
    "no-kill": None,  # is there: a job must outlive one of its nodes
    "array": None,
    "gpus-per-task": None,  # each rank would see one GPU, and local rank 1 would ask for one that is not there
}
_OWNED_OPTIONS_OF_ARRAYS = {
    "output": "output",
    "error": "output",
    "array": "tasks and max_running",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory_gib",
    "kill-on-invalid-dep": None,  # without it the last job would wait for ever for a task that has failed
    "nodes": None,
    "ntasks": None,
    "ntasks-per-node": None,
}

# Variables by which a rank knows its place: its supervisor sets them.
_OWNED_VARIABLES_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR",
    "MASTER_PORT", "MASTER_LISTEN_FD", "PRETRAIN_RESTART", "PYTHONSAFEPATH")  # fmt: skip
TASK, TASKS = "{task}", "{tasks}"

JITTER_S = 60  # by which Slurm may be early with the signal before the time limit
DEFAULT_NOTICE_S = 300  # to save before the time limit, where no save of the run was measured yet


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"names the job's files: use letters, digits, '.', '_' and '-'; found {name!r}")
    return name


def check_directive(text: str) -> str:
    """Refuse what cannot stand in one #SBATCH line: line breaks and other characters that do not print."""
    if not text.isprintable():
        raise ValueError(f"goes into one #SBATCH line: no line breaks or other control characters; found {text!r}")
    return text


def check_output(folder: str) -> str:
    if re.search(r"[%\\]", folder) or not folder:
        raise ValueError(f"is a folder; Slurm gives '%' and '\\' in log names a meaning of its own; found {folder!r}")
    return folder


def check_host(name: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_.-]+@)?[A-Za-z0-9][A-Za-z0-9._:-]*", name):
        raise ValueError(f"is a host as ssh takes it, such as node7 or me@node7; found {name!r}")
    return name


def check_word(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"no program can be given a NUL character; found {text!r}")
    return text


def number_to_text(value: Any) -> Any:
    """Let `OMP_NUM_THREADS: 8` stand for "8"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def flag_to_text(value: Any) -> Any:
    """Let `exclusive: true` stand for the option without a value."""
    return "" if value is True else number_to_text(value)


Word = Annotated[str, AfterValidator(check_word)]
Directive = Annotated[str, Field(min_length=1), AfterValidator(check_directive)]


class SlurmConfig(ConfigModel):
    """The keys that every kind of job on Slurm has. `docs/launch.md` explains each key for its users."""

    owned_options: ClassVar[dict[str, str | None]]
    owned_variables: ClassVar[tuple[str, ...]] = ()

    kind: str
    name: Annotated[str, AfterValidator(check_name)]
    cluster: Annotated[Word, Field(min_length=1)] | None = None  # a file of keys that all jobs on a cluster share
    working_directory: Directive | None = None
    setup: list[Word] = []
    environment: dict[str, Annotated[Word, BeforeValidator(number_to_text)]] = {}
    partition: Directive | None = None
    account: Directive | None = None
    qos: Directive | None = None
    constraint: Directive | None = None
    exclude: Directive | None = None
    reservation: Directive | None = None
    extra_sbatch: dict[str, Annotated[str, BeforeValidator(flag_to_text), AfterValidator(check_directive)]] = {}
    time_limit_min: int = Field(ge=1)
    requeue: bool = True

    @pydantic.field_validator("environment")
    @classmethod
    def check_environment(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if name in cls.owned_variables or name.startswith("SLURM_"):
                raise ValueError(f"{name} is set by Slurm or the script; leave it out")
        return environment

    @pydantic.field_validator("extra_sbatch")
    @classmethod
    def check_extra_sbatch(cls, options: dict[str, str]) -> dict[str, str]:
        for option in options:
            if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", option):
                raise ValueError(f"{option!r} is not a long option of sbatch; write it without dashes in front")
            if option in cls.owned_options:
                key = cls.owned_options[option]
                raise ValueError(f"--{option} " + (f"is written from {key}; set that" if key else "breaks the script"))
        return options


class ContainerConfig(ConfigModel):
    """The container in which each node's supervisor, and so its ranks, run."""

    runtime: Literal["pyxis", "apptainer"]
    image: Annotated[Word, Field(min_length=1)]
    mounts: list[
        Annotated[Word, Field(min_length=1)]
    ] = []  # SOURCE:TARGET[:ro]; the working directory and the run folder are added
    options: list[Word] = []  # more options of srun (pyxis: --container-workdir=...) or of `apptainer exec`


class PreflightConfig(ConfigModel):
    """The checks of all nodes before step 0."""

    enabled: bool = True
    timeout_s: float = Field(default=60.0, gt=0)


class JobConfig(SlurmConfig):
    """A job of ranks, one a GPU. `configs/launch/slurm.yaml` shows each key."""

    owned_options = _OWNED_OPTIONS | _OWNED_OPTIONS_OF_RANKS
    owned_variables = _OWNED_VARIABLES_OF_RANKS

    kind: Literal["slurm", "local", "ssh"] = "slurm"

    # What each rank runs: `python -m pretrain train CONFIG key=value ...`, or any command.
    config: Annotated[Word, Field(min_length=1)] | None = None
    overrides: list[Word] = []
    command: Annotated[list[Word] | None, Field(min_length=1, validate_default=True)] = None
    run: Annotated[Directive, AfterValidator(check_output)] | None = None
    python: Annotated[Word, Field(min_length=1)] = "python3"
    container: ContainerConfig | None = None

    # On what.
    nodes: int = Field(ge=1)
    spare_nodes: int = Field(default=0, ge=0)
    min_nodes: Annotated[int | None, Field(ge=1, validate_default=True)] = None
    gpus_per_node: int = Field(ge=1)
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    cpus_per_gpu: int = Field(default=8, ge=1)
    memory_gib_per_node: int | None = Field(default=None, ge=0)
    hosts: list[Annotated[str, AfterValidator(check_host)]] = []
    hostfile: Annotated[Word, Field(min_length=1)] | None = None
    mail: Directive | None = None
    mail_events: list[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_80", "TIME_LIMIT_90", "ALL"]] = [
        "END", "FAIL", "REQUEUE",
    ]  # fmt: skip

    # What happens before and after the time limit, and when something breaks.
    time_limit_min: Annotated[int | None, Field(ge=1, validate_default=True)] = None
    save_before_end_s: Annotated[int | None, Field(ge=0, le=65535, validate_default=True)] = (
        None  # 65535: Slurm's limit
    )
    chain: int = Field(default=1, ge=1)
    singleton: bool = False
    max_restarts: int = Field(default=30, ge=0)
    max_lives_same_failure: int = Field(default=2, ge=1)
    max_lives_without_checkpoint: int = Field(default=5, ge=1)
    node_silent_s: float = Field(default=4.0, gt=0)
    rank_silent_s: float = Field(default=60.0, gt=0)
    start_wait_s: float = Field(default=120.0, gt=0)
    heartbeat_s: float = Field(default=0.5, gt=0)
    node_mtbf_h: float = Field(default=1000.0, gt=0)
    preflight: PreflightConfig = PreflightConfig()

    @pydantic.field_validator("command")
    @classmethod
    def check_command(cls, command: list[str] | None, info: pydantic.ValidationInfo) -> list[str] | None:
        config, overrides = info.data.get("config"), info.data.get("overrides")
        if (command is None) == (config is None):
            raise ValueError("give either config (and overrides), or command: what should each rank run?")
        if command is not None and overrides:
            raise ValueError("overrides belong to config; write the arguments of a command into the command")
        return command

    @pydantic.field_validator("min_nodes")
    @classmethod
    def check_min_nodes(cls, least: int | None, info: pydantic.ValidationInfo) -> int | None:
        nodes = info.data.get("nodes")
        if nodes is None:
            return least
        if least is not None and least > nodes:
            raise ValueError(f"{least} is more than nodes={nodes}")
        return least or nodes

    @pydantic.field_validator("hostfile")
    @classmethod
    def check_hostfile(cls, hostfile: str | None, info: pydantic.ValidationInfo) -> str | None:
        if hostfile and info.data.get("hosts"):
            raise ValueError("give either hosts or hostfile")
        return hostfile

    @pydantic.field_validator("time_limit_min")
    @classmethod
    def check_time_limit(cls, minutes: int | None, info: pydantic.ValidationInfo) -> int | None:
        if minutes is None and info.data.get("kind") == "slurm":
            raise ValueError("is missing. Jobs on Slurm have a limit; set it in the file or as time_limit_min=...")
        return minutes

    @pydantic.field_validator("save_before_end_s")
    @classmethod
    def check_save_before_end(cls, seconds: int | None, info: pydantic.ValidationInfo) -> int | None:
        time_limit_min = info.data.get("time_limit_min")
        if seconds and time_limit_min is not None and seconds + JITTER_S >= time_limit_min * 60:
            raise ValueError(
                f"{seconds} s before the end, and up to {JITTER_S} s sooner, is not within time_limit_min={time_limit_min}"
            )
        return seconds

    @pydantic.field_validator("heartbeat_s")
    @classmethod
    def check_heartbeat(cls, seconds: float, info: pydantic.ValidationInfo) -> float:
        silent_s = info.data.get("node_silent_s")
        if silent_s is not None and seconds * 2 > silent_s:
            raise ValueError(f"a node would count as silent (node_silent_s={silent_s}) after less than two beats")
        return seconds


class ResolvedJob(JobConfig):
    """A job with all that depends on where and when it is submitted, as RUN/launch/job.json holds it. No null is left in `run`,
    `working_directory`, `min_nodes`; paths are absolute."""

    batch_size: int | None = None  # of the run config: ranks must divide it
    bad_nodes: str  # where nodes that broke are remembered: beside the cluster's file, else with the run

    @property
    def launch(self) -> Path:
        """RUN/launch: all that belongs to starting this run and keeping it going."""
        return Path(self.run) / FOLDER

    @property
    def words(self) -> list[str]:
        """The command of each rank."""
        return build_command(self)


class ArrayConfig(SlurmConfig):
    """Tasks that share nothing but a folder, and a last job when all have succeeded. `configs/launch/build.yaml` shows
    each key."""

    owned_options = _OWNED_OPTIONS | _OWNED_OPTIONS_OF_ARRAYS

    kind: Literal["slurm_array"]
    output: Annotated[Directive, AfterValidator(check_output)] = "runs/slurm"

    command: list[Word] = Field(min_length=1)  # {task} and {tasks} in it; without {task}, --task {task}/{tasks} follows
    then: Annotated[list[Word], Field(min_length=1)] | None = None
    tasks: int = Field(ge=1)
    max_running: int | None = Field(default=None, ge=1)
    cpus_per_task: int = Field(default=8, ge=1)
    memory_gib: int | None = Field(default=None, ge=0)

    @pydantic.field_validator("then")
    @classmethod
    def check_then(cls, then: list[str] | None) -> list[str] | None:
        if then and any(TASK in word for word in then):
            raise ValueError(f"runs once, after all tasks, so there is no {TASK} for it")
        return then


JOBS: dict[str, type[SlurmConfig]] = {
    "slurm": JobConfig,
    "local": JobConfig,
    "ssh": JobConfig,
    "slurm_array": ArrayConfig,
}

# What a cluster file may hold: what is the same for all jobs there.
CLUSTER_KEYS = (
    "partition", "account", "qos", "constraint", "exclude", "reservation", "extra_sbatch", "setup", "environment",
    "container", "python", "gpus_per_node", "gpu_type", "gpu_request", "cpus_per_gpu", "memory_gib_per_node", "mail",
    "time_limit_min", "requeue", "node_mtbf_h",
)  # fmt: skip


def load_job(path: str | Path, overrides: list[str]) -> SlurmConfig:
    """Read a job file, with `key=value` overrides, as its `kind:` says (without one: slurm), over its cluster's file.

    Raises ConfigError.
    """
    values = read_yaml(path)
    for override in overrides:
        set_dotted(values, override)
    kind = values.get("kind", "slurm")
    if not isinstance(kind, str) or kind not in JOBS:
        raise ConfigError(f"{path}: kind: unknown kind {kind!r}. Valid: {', '.join(JOBS)}")
    cluster = values.get("cluster")
    if isinstance(cluster, str):
        values = merge_cluster(values, read_cluster(cluster), JOBS[kind])
    return check_config(values, JOBS[kind], str(path))


def read_cluster(path: str | Path) -> dict[str, Any]:
    """The keys of a cluster file. Raises ConfigError; values are checked with those of the job."""
    values = read_yaml(path)
    for key in values:
        if key not in CLUSTER_KEYS:
            raise ConfigError(
                f"{path}: {key}: unknown key.{suggest(key, CLUSTER_KEYS)} Valid: {', '.join(CLUSTER_KEYS)}"
            )
    return values


def merge_cluster(job: dict[str, Any], cluster: dict[str, Any], model: type[SlurmConfig]) -> dict[str, Any]:
    """The job's values go over the cluster's, where they are not null; variables and options of sbatch one by one. The
    job's lines of `setup` come after the cluster's."""
    merged = dict(job)
    for key, value in cluster.items():
        own = job.get(key)
        if key not in model.model_fields:  # an array has no GPUs
            continue
        if own is None:
            merged[key] = value
        elif isinstance(own, dict) and isinstance(value, dict) and key in ("environment", "extra_sbatch"):
            merged[key] = {**value, **own}
        elif isinstance(own, list) and isinstance(value, list) and key == "setup":
            merged[key] = [*value, *own]
    return merged


def resolve_job(job: JobConfig) -> ResolvedJob:
    """The job with absolute paths, its run folder and hosts, and the notice before its time limit. Raises ConfigError."""
    base = Path(os.path.abspath(job.working_directory or "."))
    run = base / find_run(job, base)
    values = job.model_dump() | {"working_directory": str(base), "run": str(run)}
    values["cluster"] = os.path.abspath(job.cluster) if job.cluster else None
    values["bad_nodes"] = str(Path(values["cluster"] or run / FOLDER / "job").with_name("bad_nodes.json"))
    for path in (str(base), str(run)) if job.container else ():
        if re.search("[,:]", path):
            raise ConfigError(f"container: {path}: a path with ',' or ':' cannot be mounted. Choose another folder")
    nodes = job.nodes + job.spare_nodes
    if job.kind == "local":
        if nodes != 1:
            raise ConfigError(f"nodes: kind: local is this machine alone; found {nodes}, spares included. Set nodes=1")
        values["hosts"] = ["localhost"]
    if job.kind == "ssh":
        values |= {"hosts": job.hosts or read_hostfile(job.hostfile), "hostfile": None}
        if len(values["hosts"]) < nodes:
            raise ConfigError(f"hosts: {len(values['hosts'])} are too few for {nodes} nodes, spares included")
    if job.save_before_end_s is None and job.time_limit_min is not None:
        values["save_before_end_s"] = choose_notice_s(job.time_limit_min, read_save_stalls_s(run))
    if job.config and (base / job.config).is_file():
        train = read_run_config(job, base).get("train")
        size = train.get("batch_size") if isinstance(train, dict) else None
        values["batch_size"] = size if isinstance(size, int) else None
    return check_config(values, ResolvedJob, job.name)


def find_run(job: JobConfig, base: Path) -> str:
    """The run folder: the job's `run`, else that of the run config with its overrides, else one by the job's name."""
    if job.run:
        return job.run
    if job.config is None:
        return f"runs/{job.name}"
    run = read_run_config(job, base).get("run")
    if not isinstance(run, str):
        raise ConfigError(f"{base / job.config}: run: should be the run's folder; found {run!r}")
    try:
        return check_output(check_directive(run))
    except ValueError as error:
        raise ConfigError(f"{base / job.config}: run: {error}") from None


def choose_notice_s(time_limit_min: int, stalls_s: list[float]) -> int:
    """How long before the time limit to ask for a checkpoint: twice the longest of the run's last saves, and a margin for
    the step that is under way; Slurm's jitter comes on top of it. At most half of the time limit."""
    wanted_s = max(2 * max(stalls_s[-5:]) + 60, 120) if stalls_s else DEFAULT_NOTICE_S
    return max(0, min(int(wanted_s), time_limit_min * 30 - JITTER_S))


def read_save_stalls_s(run: Path) -> list[float]:
    """How long the run's saves have held up training, in seconds, from its events."""
    stalls_s = []
    for event in read_lines(run / "events.jsonl"):
        if event.get("event") == "save" and isinstance(event.get("stall_s"), int | float):
            stalls_s.append(float(event["stall_s"]))
    return stalls_s


def read_hostfile(path: str | None) -> list[str]:
    """The hosts of a file with one a line; what follows a blank (`slots=8`) or a `#` is left out."""
    if path is None:
        raise ConfigError("hosts: kind: ssh needs hosts=[a, b] or hostfile=FILE with one host a line")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"hostfile: {path}: {error.strerror}") from None
    words = [line.partition("#")[0].split() for line in lines]
    hosts = [word[0] for word in words if word]
    if len(set(hosts)) != len(hosts):
        twice = next(host for host in hosts if hosts.count(host) > 1)
        raise ConfigError(f"hostfile: {path}: {twice} is there twice; one supervisor a host starts all its ranks")
    return hosts


def read_job(path: str | Path) -> ResolvedJob:
    """The resolved job that `submit` wrote: RUN/launch/job.json. Raises ConfigError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. `python -m launch submit` writes it") from None
    except ValueError:
        raise ConfigError(f"{path}: is not JSON. `python -m launch submit` writes it") from None
    return check_config(values, ResolvedJob, str(path))


def build_command(job: SlurmConfig) -> list[str]:
    """The command of each rank or task, as words; {task} stands in it for the number of the task."""
    if isinstance(job, ArrayConfig):
        return build_array_command(job)
    if job.command is not None:
        return job.command
    run = [f"run={job.run}"] if job.run else []
    return [job.python, "-m", "pretrain", "train", job.config, *job.overrides, *run]


def build_array_command(job: ArrayConfig) -> list[str]:
    words = list(job.command)
    if not any(TASK in word for word in words):
        words += ["--task", f"{TASK}/{TASKS}"]
    return [word.replace(TASKS, str(job.tasks)) for word in words]


def read_run_config(job: JobConfig, base: Path) -> dict[str, Any]:
    """The values of a job's run config with its overrides; relative paths start at `base`, where the job will run.

    Raises ConfigError where it could not even be read.
    """
    path = base / job.config
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"config: {path}: no such file.{near} It is looked up from working_directory")
    values = read_yaml(path)
    for override in job.overrides:
        set_dotted(values, override)
    return values
