"""The commands: python -m launch render | submit."""

import argparse
import sys

from data_tools.errors import run_command
from launch import slurm, slurm_array
from launch.job import build_command, load_job

# A backend is a module with `render(job, command)`, which returns text, and `submit(job, command)`.
BACKENDS = {"slurm": slurm, "slurm_array": slurm_array}


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return run_command(options.function, options.config, options.overrides)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Run training and data jobs on a cluster.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("render", render_job, "print the script that submit would submit"),
        ("submit", submit_job, "submit the job; print its number, its script and its logs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", metavar="CONFIG", help="job file, such as configs/launch/slurm.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. nodes=2")
        command.set_defaults(function=function)
    return parser


def render_job(config: str, overrides: list[str]) -> None:
    job = load_job(config, overrides)
    print(BACKENDS[job.kind].render(job, build_command(job)), end="")


def submit_job(config: str, overrides: list[str]) -> None:
    job = load_job(config, overrides)
    BACKENDS[job.kind].submit(job, build_command(job))


if __name__ == "__main__":
    sys.exit(main())
