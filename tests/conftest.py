"""What tests share: small real shards, and a way to run the commands as a user does."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "pretrain")]  # paths.py, processes.py, ranks.py, parity.py

from paths import ROOT  # noqa: E402
from ranks import Command  # noqa: E402

# There is one server of forks in a process. It starts with the first test that needs it, and has this environment then.
multiprocessing.set_forkserver_preload(["imported"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[:2], os.environ.get("PYTHONPATH", "")])

# A shell's background job ignores it, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network, nor wait for it
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: threads would only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread each folder's files evenly over the order, so that tests of launch, which mostly wait, run beside others."""
    files: dict[Path, dict[Path, None]] = {}
    for item in items:
        files.setdefault(item.path.parent, {})[item.path] = None
    place = {path: (number + 0.5) / len(folder) for folder in files.values() for number, path in enumerate(folder)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (48 drawn scenes) and val/ (24) as real shards."""
    from data_tools.build import build_shards
    from data_tools.scenes import draw_scenes

    root = tmp_path_factory.mktemp("shards")
    draw_scenes(root / "scenes", count=48, val_count=24, processes=1)
    for split in ("train", "val"):
        build_shards(
            root / "scenes" / "captions.tsv",
            root / split,
            root / "scenes" / "images",
            samples_per_shard=20,
            processes=1,
            keep_list=root / "scenes" / "splits" / f"{split}.txt",
        )
    return root


@pytest.fixture
def start_pretrain():
    """Start `python -m pretrain ARGUMENTS` with pipes; it is killed if a test leaves it running."""
    started = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def run_pretrain(start_pretrain):
    """Run `python -m pretrain ARGUMENTS` to its end: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        process = start_pretrain(*arguments)
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr

    return run


@pytest.fixture
def fork_pretrain(tmp_path: Path):
    """The same as `run_pretrain`, as `ranks` processes that need not import anything: the way to a run that is quick."""

    def run(*arguments: object, ranks: int | None = None) -> tuple[int, str, str]:
        command = Command([str(argument) for argument in arguments], ranks, tmp_path / "forked")
        codes = [code for code in command.wait() if code]
        return next(iter(codes), 0), command.printed("stdout"), command.printed("stderr")

    return run
