"""The commands: python -m pretrain train | evaluate | export | checkpoint | doctor | demo."""

import argparse
import logging
import os
import sys
import time

from data_tools.errors import UserError, run_command

SPEAK_AFTER_S = 10
LOST_SPEAK_AFTER_S = 30  # launchers end the others sooner


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no key=value that comes after an option: "train CONFIG --ranks 2 seed=1"
    late = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return run_command(options.function, options, arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Pretrain, evaluate and export joint image-text models."
    )
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it, and sets LOCAL_RANK too
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train from a config, alone or as one rank of a job")
    command.add_argument("config", help="YAML file, as those in configs/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.batch_size=512")
    command.add_argument("--ranks", type=positive, metavar="N", help="start N local processes")
    command.add_argument("--check", action="store_true", help="print the resolved config and exit")
    command.set_defaults(function=run_train)

    command = commands.add_parser("evaluate", help="measure a run")
    tasks = command.add_subparsers(required=True, metavar="TASK")
    task = tasks.add_parser("retrieval", help="recall at 1, 5, 10 both ways, and after match reranking")
    task.add_argument("--run", required=True, help="run folder of a training run")
    task.add_argument("--shards", required=True, metavar="DIR", help="folder written by python -m data_tools build")
    task.add_argument("--rerank", type=natural, default=16, metavar="K", help="candidates to rerank; 0 = none (16)")
    task.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pictures at a time a rank (64)")
    task.add_argument("--json", metavar="FILE", help="also write the numbers there")
    task.add_argument("--ranks", type=positive, metavar="N", help="start N local processes")
    task.set_defaults(function=run_evaluate)

    command = commands.add_parser("export", help="write the weights for another library, and prove them by reloading")
    command.add_argument("--run", required=True, help="run folder of a training run")
    command.add_argument("--to", required=True, choices=("open_clip", "huggingface", "blip", "native"))
    command.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    command.add_argument("--ema", action="store_true", help="the average of the weights instead of the weights")
    command.set_defaults(function=run_export)

    command = commands.add_parser("checkpoint", help="look after the checkpoints of a run")
    tasks = command.add_subparsers(required=True, metavar="TASK")
    texts = {
        "list": "each with its step, size and layout",
        "verify": "read every byte; exit code 1 if one is damaged",
        "consolidate": "weights and moments of a sharded checkpoint, each in one safetensors file",
        "prune": "remove all but the last ones",
    }
    for name, text in texts.items():
        task = tasks.add_parser(name, help=text)
        task.add_argument("run", metavar="RUN", help="run folder of a training run")
        task.set_defaults(function=run_checkpoint, task=name)
        if name == "consolidate":
            task.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
            task.add_argument("--step", type=positive, metavar="N", help="of this step (the newest)")
        if name == "prune":
            task.add_argument("--keep", type=positive, default=2, metavar="N", help="the last N stay (2)")
            task.add_argument("--keep-every", type=positive, metavar="M", help="and those of each M-th step")

    command = commands.add_parser("doctor", help="look into what a config would do, or what a run does")
    checks = command.add_subparsers(required=True, metavar="CHECK")
    check = checks.add_parser("order", help="print the keys that a rank would take: STEP POSITION DATASET KEY")
    check.add_argument("config", help="YAML file, as those in configs/")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.batch_size=512")
    check.add_argument("--world-size", type=positive, default=1, metavar="W", help="ranks of the run (1)")
    check.add_argument("--rank", type=natural, default=0, metavar="R", help="the rank to look at (0)")
    check.add_argument("--start", type=natural, default=0, metavar="STEP", help="steps done before (0)")
    check.add_argument("--steps", type=natural, default=1, metavar="N", help="how many steps to print (1)")
    check.set_defaults(function=run_doctor_order)

    check = checks.add_parser("loader", help="measure the loader: where its time goes, threads to use, mixing")
    check.add_argument("config", help="YAML file, as those in configs/")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.path=shards/train")
    check.add_argument(
        "--world-size", type=positive, default=1, metavar="W", help="ranks of the run; one is measured (1)"
    )
    check.add_argument("--threads", type=positive, nargs="+", metavar="N", help="numbers of threads to try")
    check.add_argument(
        "--step-s", type=seconds, default=0.0, metavar="S", help="seconds of a training step without its data (0)"
    )
    check.add_argument(
        "--ranks-per-node", type=positive, default=1, metavar="N", help="ranks that share this machine's processors (1)"
    )
    check.add_argument("--json", metavar="FILE", help="also write the numbers there")
    check.set_defaults(function=run_doctor_loader)

    check = checks.add_parser("stragglers", help="print where each rank's time goes in a run, the slowest first")
    check.add_argument("run", metavar="RUN", help="run folder of a training run")
    check.set_defaults(function=run_doctor_stragglers)

    check = checks.add_parser("node", help="whether this machine can take part in a run; one JSON line")
    check.add_argument("config", nargs="?", help="YAML file, as those in configs/: its shards and run folder are tried")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.path=shards/train")
    check.add_argument("--folder", metavar="DIR", help="the shared folder to write into (the config's run folder)")
    check.set_defaults(function=run_doctor_node)

    check = checks.add_parser("link", help="how fast the nodes of a group exchange data, pair by pair; one JSON line")
    check.add_argument("--backend", choices=("auto", "sockets", "gloo", "nccl"), default="auto", help="(auto)")
    check.add_argument("--rounds", type=positive, metavar="N", help="of disjoint pairs (until each pair was measured)")
    check.add_argument("--seconds", type=float, default=0.3, metavar="S", help="each pair is measured for (0.3)")
    check.set_defaults(function=run_doctor_link)

    command = commands.add_parser("demo", help="the whole path on drawn scenes, or on your own pictures")
    command.add_argument("--captions", metavar="FILE", help="TSV or CSV with columns filename, caption")
    command.add_argument("--images", metavar="DIR", help="folder of the pictures that FILE names")
    command.add_argument("--train-list", metavar="FILE", help="names of the pictures to train on, one a line")
    command.add_argument("--val-list", metavar="FILE", help="names of the pictures to evaluate on, one a line")
    command.add_argument("--out", default="runs/demo", metavar="DIR", help="folder for everything (runs/demo)")
    command.add_argument("--config", metavar="YAML", help="training config (configs/demo.yaml)")
    command.add_argument("--ranks", type=positive, default=2, metavar="N", help="training processes (2)")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    command.set_defaults(function=run_demo)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; found {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0; found {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0; found {text}")
    return value


def set_up_logging() -> None:
    """Rank 0 tells what happens; the others only what is wrong, with their rank."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    form = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    logging.basicConfig(format=form, level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("pretrain").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def starts_ranks(options: argparse.Namespace) -> bool:
    """Whether this process is to start the ranks, rather than be one."""
    if options.ranks is not None and "RANK" in os.environ and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        raise UserError("--ranks: a launcher has started this process as a rank already; leave --ranks out")
    return options.ranks is not None and "RANK" not in os.environ


def run_train(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    from pretrain.config import load_config, render_config
    from pretrain.train import RunConfig, train

    config = load_config(options.config, options.overrides, RunConfig)
    if options.check:
        print(render_config(config), end="")
        return 0
    if starts_ranks(options):
        from pretrain.local import run_ranks

        return run_ranks(arguments, options.ranks)
    return as_rank(lambda world: train(config, world), config.watch.patience_s)


def run_evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    if starts_ranks(options):
        from pretrain.local import run_ranks

        return run_ranks(arguments, options.ranks)
    from pretrain.evaluate.retrieval import evaluate_run

    def evaluate(world):
        return evaluate_run(options.run, options.shards, options.rerank, options.batch_size, options.json, world)

    return as_rank(evaluate)


def run_export(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    from pretrain.export import export_run

    return export_run(options.run, options.to, options.out, options.ema)


def run_checkpoint(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    from pretrain.checkpoint import commands

    if options.task == "list":
        return commands.list_checkpoints(options.run)
    if options.task == "verify":
        return commands.verify_checkpoints(options.run)
    if options.task == "consolidate":
        return commands.consolidate(options.run, options.out, options.step)
    return commands.prune_checkpoints(options.run, options.keep, options.keep_every)


def run_doctor_order(options: argparse.Namespace, arguments: list[str]) -> int:
    from pretrain.config import load_config
    from pretrain.doctor.order import print_order
    from pretrain.train import RunConfig

    config = load_config(options.config, options.overrides, RunConfig)
    print_order(config, options.world_size, options.rank, options.start, options.steps, sys.stdout)
    return 0


def run_doctor_loader(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    from data_tools.files import write_json_atomic
    from pretrain.config import load_config
    from pretrain.doctor.loader import examine, render
    from pretrain.train import RunConfig

    config = load_config(options.config, options.overrides, RunConfig)
    report = examine(config, options.world_size, options.threads, options.step_s, options.ranks_per_node)
    print(render(report))
    if options.json:
        write_json_atomic(options.json, report)
    return 0


def run_doctor_stragglers(options: argparse.Namespace, arguments: list[str]) -> int:
    from pretrain.doctor.stragglers import examine, render

    print(render(*examine(options.run)))
    return 0


def run_doctor_node(options: argparse.Namespace, arguments: list[str]) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # one core is tried: several would wait for each other where others work too
    from pretrain.doctor.node import print_node

    return print_node(options.config, options.overrides, options.folder)


def run_doctor_link(options: argparse.Namespace, arguments: list[str]) -> int:
    from pretrain.doctor.link import print_link

    return print_link(options.backend, options.rounds, options.seconds)


def run_demo(options: argparse.Namespace, arguments: list[str]) -> int:
    set_up_logging()
    from pretrain.demo import run_demo as run

    return run(options)


def as_rank(function, *patience_s: float) -> int:
    """Join the job, run `function(world)`, leave the job. `patience_s`: as of `connect`.

    A user's mistake is mostly found by all ranks at once. Rank 0 tells it; the others wait, to be ended with it, and
    speak only if they are still there. So do those that lose a rank which has something to tell: a restart may help them.
    """
    from pretrain.signals import EXIT_RESTART
    from pretrain.world import connect, disconnect, is_lost_connection

    world = connect(*patience_s)
    try:
        return function(world)
    except UserError:
        if not world.is_main:
            time.sleep(SPEAK_AFTER_S)
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(LOST_SPEAK_AFTER_S)
        print("error: another rank has ended; what it says of that is in its own output", file=sys.stderr, flush=True)
        return EXIT_RESTART
    finally:
        disconnect()


if __name__ == "__main__":
    sys.exit(main())
