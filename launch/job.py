"""What a job is: the keys of a job file, and the command that it runs."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from data_tools.errors import suggest
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
    "output": "output",
    "error": "output",
    "chdir": "working_directory",
    "open-mode": None,
    "wrap": None,
}
_OWNED_OPTIONS_OF_RANKS = {
    "nodes": "nodes",
    "ntasks": "nodes and gpus_per_node",
    "ntasks-per-node": "gpus_per_node",
    "gpus": "nodes and gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_gpu",
    "mem": "memory_gib_per_node",
    "signal": "save_before_end_s",
    "array": None,
    "gpus-per-task": None,  # each rank would see one GPU, and local rank 1 would ask for one that is not there
}
_OWNED_OPTIONS_OF_ARRAYS = {
    "array": "tasks and max_running",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory_gib",
    "kill-on-invalid-dep": None,  # without it the last job would wait for ever for a task that has failed
    "nodes": None,
    "ntasks": None,
    "ntasks-per-node": None,
}

# Variables by which a rank knows its place: the script sets them for each rank.
_OWNED_VARIABLES_OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
TASK, TASKS = "{task}", "{tasks}"


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
    output: Annotated[Directive, AfterValidator(check_output)] = "runs/slurm"

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


class JobConfig(SlurmConfig):
    """A job of ranks, one a GPU. `configs/launch/slurm.yaml` shows each key."""

    owned_options = _OWNED_OPTIONS | _OWNED_OPTIONS_OF_RANKS
    owned_variables = _OWNED_VARIABLES_OF_RANKS

    kind: Literal["slurm"] = "slurm"

    # What each rank runs: `python -m pretrain train CONFIG key=value ...`, or any command.
    config: Annotated[Word, Field(min_length=1)] | None = None
    overrides: list[Word] = []
    command: Annotated[list[Word] | None, Field(min_length=1, validate_default=True)] = None
    python: Annotated[Word, Field(min_length=1)] = "python3"

    # On what.
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    cpus_per_gpu: int = Field(default=8, ge=1)
    memory_gib_per_node: int | None = Field(default=None, ge=0)

    # What happens before and after the time limit.
    save_before_end_s: Annotated[int, Field(ge=0, le=65535, validate_default=True)] = 300  # 65535: Slurm's limit
    max_requeues: int = Field(default=30, ge=0)

    @pydantic.field_validator("command")
    @classmethod
    def check_command(cls, command: list[str] | None, info: pydantic.ValidationInfo) -> list[str] | None:
        config, overrides = info.data.get("config"), info.data.get("overrides")
        if (command is None) == (config is None):
            raise ValueError("give either config (and overrides), or command: what should each rank run?")
        if command is not None and overrides:
            raise ValueError("overrides belong to config; write the arguments of a command into the command")
        return command

    @pydantic.field_validator("save_before_end_s")
    @classmethod
    def check_save_before_end(cls, seconds: int, info: pydantic.ValidationInfo) -> int:
        time_limit_min = info.data.get("time_limit_min")
        if seconds and time_limit_min is not None and seconds + 60 >= time_limit_min * 60:
            raise ValueError(
                f"{seconds} s before the end, and up to 60 s sooner, is not within time_limit_min={time_limit_min}"
            )
        return seconds


class ArrayConfig(SlurmConfig):
    """Tasks that share nothing but a folder, and a last job when all have succeeded. `configs/launch/build.yaml` shows
    each key."""

    owned_options = _OWNED_OPTIONS | _OWNED_OPTIONS_OF_ARRAYS

    kind: Literal["slurm_array"]

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


JOBS: dict[str, type[SlurmConfig]] = {"slurm": JobConfig, "slurm_array": ArrayConfig}


def load_job(path: str | Path, overrides: list[str]) -> SlurmConfig:
    """Read a job file, with `key=value` overrides, as its `kind:` says (without one: slurm). Raises ConfigError."""
    values = read_yaml(path)
    for override in overrides:
        set_dotted(values, override)
    kind = values.get("kind", "slurm")
    if not isinstance(kind, str) or kind not in JOBS:
        raise ConfigError(f"{path}: kind: unknown kind {kind!r}. Valid: {', '.join(JOBS)}")
    return check_config(values, JOBS[kind], str(path))


def build_command(job: SlurmConfig) -> list[str]:
    """The command of each rank or task, as words; {task} stands in it for the number of the task."""
    if isinstance(job, ArrayConfig):
        return build_array_command(job)
    if job.command is not None:
        return job.command
    return [job.python, "-m", "pretrain", "train", job.config, *job.overrides]


def build_array_command(job: ArrayConfig) -> list[str]:
    words = list(job.command)
    if not any(TASK in word for word in words):
        words += ["--task", f"{TASK}/{TASKS}"]
    return [word.replace(TASKS, str(job.tasks)) for word in words]


def check_run_config(job: JobConfig, base: Path) -> None:
    """Refuse a job whose run config could not even be read; relative paths start at `base`, where the job will run."""
    if job.config is None:
        return
    path = base / job.config
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"config: {path}: no such file.{near} It is looked up from working_directory")
    values = read_yaml(path)
    for override in job.overrides:
        set_dotted(values, override)
