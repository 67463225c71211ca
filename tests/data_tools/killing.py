"""Runs commands of `data_tools` in process groups of their own, and kills some of them by SIGKILL at random instants."""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
FILES = ("build.json", "plan.tmp", "plan.json", ".idx", ".parquet", "_stats.json", "sizes.json", "manifest.json")
_CONTEXT = multiprocessing.get_context("forkserver")


def hash_files(out: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder; temporary files and folders would be among them."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() or path.name.endswith(".tmp"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Command:
    """A command that has begun, `python -m data_tools ARGUMENTS` but for the time that imports take.

    It is killed just before it opens, renames or removes a file for the `ends_at`-th time, counting only those with
    `word` in their path: its whole process group, or with `group` False only the process itself.
    """

    def __init__(self, output: Path, arguments: list, ends_at: int = 0, word: str = "", group: bool = True) -> None:
        self._output = output
        ready, theirs = _CONTEXT.Pipe()
        words = [str(argument) for argument in arguments]
        self.process = _CONTEXT.Process(target=_run, args=(str(output), words, ends_at, word, group, theirs))
        self.process.start()
        theirs.close()
        assert ready.poll(60)
        ready.recv()
        self.pid = self.process.pid

    def end(self) -> int:
        """Wait for the end; its exit code, or less than 0 for a signal."""
        self.process.join(60)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode

    def succeed(self) -> str:
        """Wait for the end, which has to be a good one; what it printed."""
        assert self.end() == 0, self.output
        return self.output

    @property
    def output(self) -> str:
        return self._output.read_text()


def _run(output: str, arguments: list[str], ends_at: int, word: str, group: bool, ready) -> None:
    from data_tools.__main__ import main

    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    events = 0

    def count(event: str, details: tuple) -> None:
        nonlocal events
        if event in EVENTS and word in str(details):
            events += 1
            if events == ends_at:
                os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)

    ready.send("ready")
    sys.addaudithook(count)
    code = main(arguments)
    print("events", events, flush=True)
    sys.exit(code)


class Killer:
    """Kills commands at random, also when they come to one of `files`; `kills` says how many."""

    def __init__(self, draw: random.Random, work: Path, files: Sequence[str] = FILES) -> None:
        self.draw = draw
        self._files = files
        self.kills = 0
        self._events = 0
        self._duration_s = 0.0
        self._work = work
        self._started = 0

    def start(self, arguments: list, *options) -> Command:
        self._started += 1
        return Command(self._work / f"output-{self._started}", arguments, *options)

    def measure(self, arguments: list) -> str:
        """Run undisturbed, and learn how long that takes and how many files it touches; what was printed."""
        command = self.start(arguments)
        started_s = time.monotonic()
        printed = command.succeed()
        self._duration_s = time.monotonic() - started_s
        self._events = int(printed.split()[-1])
        return printed

    def run_or_kill(self, arguments: list) -> bool:
        """Run, and kill at a random instant or event; whether it came to its end before that."""
        group = self.draw.random() < 0.7
        way = self.draw.choice(["time", "event", "file"])
        if way == "time":
            command = self.start(arguments)
            time.sleep(self.draw.uniform(0, self._duration_s))
            if command.process.is_alive():
                os.killpg(command.pid, signal.SIGKILL) if group else os.kill(command.pid, signal.SIGKILL)
        elif way == "event":
            command = self.start(arguments, self.draw.randint(1, self._events), "", group)
        else:
            command = self.start(arguments, self.draw.randint(1, 4), self.draw.choice(self._files), group)
        code = command.end()
        assert code in (0, -signal.SIGKILL), (arguments, command.output)
        assert "error:" not in command.output and "Traceback" not in command.output
        self.kills += code != 0
        return code == 0
