"""The commands: python -m launch plan | submit | render | status | logs | top | cancel | resume | list | preflight | report."""

import argparse
import sys
from pathlib import Path

from data_tools.errors import run_command
from launch import slurm_array
from launch.job import ArrayConfig, JobConfig, load_job, resolve_job


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no key=value that comes after an option: "submit CONFIG --wait nodes=2"
    late = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return run_command(options.function, options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Run training and data jobs: on this machine, on hosts by ssh, on a SLURM cluster.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(function=function)
        return command

    def add_config(name: str, function, text: str) -> argparse.ArgumentParser:
        command = add(name, function, text)
        command.add_argument("config", metavar="CONFIG", help="job file, such as configs/launch/slurm.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. nodes=2")
        return command

    def add_run(name: str, function, text: str) -> argparse.ArgumentParser:
        command = add(name, function, text)
        command.add_argument("run", metavar="RUN", help="run folder of a submitted job, or its job file")
        return command

    add_config("plan", plan_job, "print what submit would do, and what is known of how it would go")
    command = add_config(
        "submit", submit_job, "check and keep code and config, then submit; print the job and its logs"
    )
    command.add_argument(
        "--wait", action="store_true", help="show the ranks' logs until the end; exit with the job's code"
    )
    add_config("render", render_job, "print the script that submit would submit")

    command = add_run("status", show_status, "where a run stands: job, progress, speed, time left, nodes")
    command.add_argument("--json", action="store_true", help="all that is known, for programs")
    command = add_run("logs", show_logs, "the ranks' logs, each line with host:rank")
    command.add_argument("--rank", type=int, nargs="+", default=[], metavar="N", help="of these ranks (all)")
    command.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="the last N lines of each (20)")
    command.add_argument("-f", "--follow", action="store_true", help="and those to come")
    command = add_run("top", show_top, "status and ranks, again and again")
    command.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds (2)")
    command = add_run("cancel", cancel_run, "have a run saved and stopped; it stays so until it is resumed")
    command.add_argument("--now", action="store_true", help="end it at once, without saving")
    command = add_run("resume", resume_run, "submit a run again, with the code and config that it has kept")
    command.add_argument(
        "--wait", action="store_true", help="show the ranks' logs until the end; exit with the job's code"
    )
    command = add("list", list_runs, "one line for each submitted run")
    command.add_argument("folders", nargs="*", default=["runs"], metavar="DIR", help="folders to look into (runs)")

    command = add("preflight", check_nodes, "check the nodes of an allocation, of hosts, or this machine")
    command.add_argument("config", metavar="CONFIG", help="job file, such as configs/launch/slurm.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. nodes=2")
    command.add_argument("--hosts", metavar="A,B", help="these hosts, by ssh")
    command = add("report", report_run, "where a run's time went, and what ended its lives")
    command.add_argument("run", metavar="RUN", help="run folder of a submitted job")
    command.add_argument("--html", metavar="FILE", help="also write a page with a timeline")
    command = add("agent", supervise, "the supervisor of one node; the job's script starts it")
    command.add_argument("file", metavar="JOB.json", help="RUN/launch/job.json")
    command.add_argument("--nodes", metavar="A,B", help="all nodes of the job (those of the SLURM job)")
    command.add_argument("--node", metavar="A", help="this one")
    command.add_argument("--job", metavar="NAME", help="of this start of the job, the same on all nodes")
    return parser


def load(options: argparse.Namespace) -> JobConfig | ArrayConfig:
    """The resolved job; an array as it is."""
    job = load_job(options.config, options.overrides)
    return resolve_job(job) if isinstance(job, JobConfig) else job


def plan_job(options: argparse.Namespace) -> None:
    from launch import submit

    job = load(options)
    print(submit.plan(job) if isinstance(job, JobConfig) else slurm_array.render(job), end="")


def render_job(options: argparse.Namespace) -> None:
    from launch import submit

    job = load(options)
    print(submit.render(job) if isinstance(job, JobConfig) else slurm_array.render(job), end="")


def submit_job(options: argparse.Namespace) -> int | None:
    from launch import submit

    job = load(options)
    if not isinstance(job, JobConfig):
        return slurm_array.submit(job)
    return follow(submit.submit(job), Path(job.run), options.wait)


def resume_run(options: argparse.Namespace) -> int | None:
    from launch import status, submit

    run = status.find_run(options.run)
    return follow(submit.resume(run), run, options.wait)


def follow(records: list[dict], run: Path, wait: bool) -> int | None:
    from launch import status, submit

    print(submit.describe(run, records), flush=True)
    return status.wait_for_end(run) if wait else None


def show_status(options: argparse.Namespace) -> None:
    from launch import status

    status.show_status(options.run, options.json)


def show_logs(options: argparse.Namespace) -> None:
    from launch import status

    status.show_logs(options.run, options.rank, options.lines, options.follow)


def show_top(options: argparse.Namespace) -> None:
    from launch import status

    status.show_top(options.run, options.every)


def cancel_run(options: argparse.Namespace) -> None:
    from launch import status

    status.cancel(options.run, options.now)


def list_runs(options: argparse.Namespace) -> None:
    from launch import status

    status.show_list(options.folders)


def check_nodes(options: argparse.Namespace) -> int | None:
    from launch import preflight

    return preflight.run(options.config, options.overrides, options.hosts)


def report_run(options: argparse.Namespace) -> int | None:
    from launch import report

    return report.run(options.run, options.html)


def supervise(options: argparse.Namespace) -> int | None:
    from launch import agent

    return agent.main(options.file, options.nodes, options.node, options.job)


if __name__ == "__main__":
    sys.exit(main())
