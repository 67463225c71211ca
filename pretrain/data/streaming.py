"""Shards that can only be read from their beginning to their end: `pipe:` commands, as webdataset users write them.

    data.path: "pipe:aws s3 cp s3://bucket/{00000..00999}.tar -"

webdataset's own stages draw shards with replacement, part the archives into samples and shuffle them in a bounded buffer.
The order is approximate: which shards come is a function of (seed, rank, position), but an epoch is not each sample once,
and a resumed run draws anew from its position instead of going on in the middle of a shard.

The commands run in a shell, which is what they are for: they come from the config, never from data.
"""

import contextlib
import io
import logging
import lzma
import os
import queue
import random
import select
import signal
import subprocess
import tarfile
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from data_tools.errors import UserError
from data_tools.shards import RawSample
from pretrain.config import ConfigError, ConfigModel, Count, Ratio
from pretrain.randomness import hash64

log = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 100
_READ_BYTES = 2**20
_WAITING_SAMPLES = 16  # read ahead by each pipe
_POLL_S = 0.2
_END_WAIT_S = 5.0
_GOOD_CODES = (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)
"""How a command ends that has written all, or has been read to the archive's end and no further."""

_GUARD = "exec 3<&0 </dev/null; ( (read -r _ <&3; kill -s KILL 0) >/dev/null 2>&1 & ); exec 3<&-\n"
"""Goes before each command: a shell that waits for the end of a pipe which nobody writes to. It comes when this process is
gone, however it went, and the shell then ends all of the command's process group. (Linux's signal at a parent's death would
reach the command's shell alone, and not what that has started; and to ask for it takes Python code between fork and exec,
which is not safe among threads.)
"""

_DAMAGED = (OSError, EOFError, tarfile.TarError, ValueError, zlib.error, lzma.LZMAError)


class StreamConfig(ConfigModel):
    """How `pipe:` paths are read."""

    pipes: Count = 2  # commands at once, for each rank
    shuffle_samples: Count = 1000  # held in memory, encoded, for each rank
    timeout_s: Ratio = 60.0  # that a command may be silent


class StreamReader:
    """Endless iterator over the samples of the shards behind a `pipe:` path, for one rank.

    Several commands run at once, each in a process group of its own and read by a thread, and their samples are taken in
    turns. Iterate over it once, and close it when done: that ends the commands and the threads.
    """

    def __init__(self, path: str, config: StreamConfig, *, seed: int, rank: int, position: int = 0) -> None:
        """`position` is where the run is now. Raises ConfigError for braces that do not match."""
        self._path, self._config = path, config
        self._shards = expand(path)
        self._numbers = {shard: number for number, shard in enumerate(self._shards)}
        self._seed = _derive(_derive(seed, "stream", position), "rank", rank)
        self.skipped = 0
        self._bad_in_a_row = 0
        self._lock = threading.Lock()  # of the two counts, and of the commands: none begins without it
        self._stopped = threading.Event()
        self._commands: set[subprocess.Popen] = set()
        # Also when the interpreter ends without a `close`, as it does on Ctrl-C.
        self._end_commands = weakref.finalize(self, _end, self._stopped, self._lock, self._commands)
        self._queues: list[queue.Queue] = [queue.Queue(_WAITING_SAMPLES) for _ in range(config.pipes)]
        self._threads = [
            threading.Thread(target=self._fill, args=(number,), daemon=True, name=f"pipe {number}")
            for number in range(config.pipes)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[RawSample]:
        """Raises UserError when 100 shards or samples in a row were bad."""
        from webdataset.filters import shuffle

        generator = random.Random(_derive(self._seed, "shuffle", 0))
        samples = self._config.shuffle_samples
        return shuffle(samples, initial=samples, rng=generator)(self._take_turns())

    def close(self) -> None:
        """End the commands, with all that they have started, and the threads."""
        self._end_commands()
        for thread in self._threads:
            thread.join()

    def _take_turns(self) -> Iterator[RawSample]:
        while True:
            for waiting in self._queues:
                while not self._stopped.is_set():
                    with contextlib.suppress(queue.Empty):
                        item = waiting.get(timeout=_POLL_S)
                        break
                else:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _fill(self, number: int) -> None:
        """The body of a thread: put the samples of shard after shard into the queue."""
        from webdataset.shardlists import ResampledShards

        seed = _derive(self._seed, "pipe", number)
        shards = ResampledShards(self._shards, seed=seed, worker_seed=lambda: 0, deterministic=True)
        try:
            for shard in shards:
                with contextlib.closing(self._read_shard(shard["url"])) as samples:
                    for sample in samples:
                        self._put(number, sample)
                        self._bad_in_a_row = 0
        except _Stopped:
            return
        except BaseException as error:  # for the thread that takes the samples
            with contextlib.suppress(_Stopped):
                self._put(number, error)

    def _put(self, number: int, item: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                return self._queues[number].put(item, timeout=_POLL_S)
        raise _Stopped

    def _read_shard(self, url: str) -> Iterator[RawSample]:
        """The samples of one shard, without one that damage may have cut short."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        held = None
        try:
            with self._start(url) as stream:
                files = tar_file_expander([{"url": url, "stream": stream}])
                for sample in group_by_keys(files, handler=lambda error: self._report(url, error)):
                    if held is not None:
                        yield held
                    held = self._convert(url, sample)
        except _DAMAGED as error:
            if self._stopped.is_set():
                raise _Stopped from None
            self._report(url, error)
        else:
            if held is None:
                self._report(url, ValueError("no sample is in it"))
            else:
                yield held

    def _convert(self, url: str, sample: dict[str, Any]) -> RawSample:
        fields = {name: value for name, value in sample.items() if not name.startswith("__")}
        # Keys need only be unique in their shard; a picture is told from others by its key.
        return RawSample(f"{self._numbers[url]}_{sample['__key__']}", url, fields)

    def _report(self, url: str, error: Exception) -> bool:
        """Count something bad; True for webdataset to go on."""
        if not isinstance(error, _DAMAGED):
            raise error
        # webdataset appends what it was reading to the arguments, and to the first of them.
        reason = getattr(error, "strerror", None) or str((*error.args, type(error).__name__)[0]).partition(" @ ")[0]
        with self._lock:
            self.skipped += 1
            self._bad_in_a_row += 1
            skipped, in_a_row = self.skipped, self._bad_in_a_row
        if skipped == 1 or skipped % 1000 == 0:
            log.warning("%s: skipped the rest of a shard or a sample (%d so far): %s", url, skipped, reason)
        if in_a_row >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"{self._path}: {in_a_row} shards or samples in a row could not be read, the last of {url}: {reason}. Run the "
                "command in a shell, into `tar t`"
            )
        return True

    @contextlib.contextmanager
    def _start(self, url: str) -> Iterator[io.BufferedReader]:
        """Run the command of a `pipe:` and give what it writes."""
        with self._lock:
            if self._stopped.is_set():
                raise _Stopped
            guard, alive = os.pipe()
            try:
                command = subprocess.Popen(
                    _GUARD + url.removeprefix("pipe:"),
                    shell=True,
                    stdin=guard,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            except BaseException:
                os.close(alive)
                raise
            finally:
                os.close(guard)
            self._commands.add(command)
        try:
            yield io.BufferedReader(_Output(command, self._config.timeout_s), _READ_BYTES)
        finally:
            with self._lock:
                self._commands.discard(command)
                _kill({command})
            os.close(alive)
            command.stdout.close()
            command.wait()


class _Stopped(Exception):
    """The reader has been closed."""


class _Output(io.RawIOBase):
    """What a command writes. Raises OSError when it is silent for too long, or fails."""

    def __init__(self, command: subprocess.Popen, timeout_s: float) -> None:
        self._command, self._timeout_s = command, timeout_s
        self._descriptor = command.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._poll.poll(self._timeout_s * 1000):
            raise OSError(f"the command was silent for {self._timeout_s:g} s")
        data = os.read(self._descriptor, len(buffer))
        buffer[: len(data)] = data
        if not data:
            self._check_end()
        return len(data)

    def _check_end(self) -> None:
        """Raise OSError where the command has failed: what it wrote may be a whole archive by chance only."""
        end_s = time.monotonic() + _END_WAIT_S
        # Its number stays taken (WNOWAIT) until its group has been killed, so that no other process can have it by then.
        look = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while (found := os.waitid(os.P_PID, self._command.pid, look)) is None:
            if time.monotonic() > end_s:
                return  # it has closed its output, and does something else
            time.sleep(0.01)
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if code not in _GOOD_CODES:
            raise OSError(f"the command ended with exit code {code}")


def _end(stopped: threading.Event, lock: threading.Lock, commands: set[subprocess.Popen]) -> None:
    """Let no command begin from now on, and end those that run."""
    stopped.set()
    with lock:
        _kill(commands)


def _kill(commands: Iterable[subprocess.Popen]) -> None:
    """End commands that have not been waited for, and all that they have started."""
    for command in commands:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(command.pid, signal.SIGKILL)


def expand(path: str) -> list[str]:
    """The `pipe:` of each shard: braces, `::` and ${...} as webdataset has them. Raises ConfigError."""
    import braceexpand
    from webdataset.shardlists import expand_urls

    try:
        shards = expand_urls(path)
    except braceexpand.UnbalancedBracesError:
        raise ConfigError(f"data.path: {path}: its braces do not match. Write ranges as {{00000..00099}}") from None
    except AssertionError as error:
        raise ConfigError(f"data.path: {path}: {error}: webdataset takes ${{NAME}} from WDS_NAME") from None
    for shard in shards:
        if not shard.startswith("pipe:"):
            raise ConfigError(f"data.path: {path}: every part between '::' begins with pipe:, found '{shard}'")
    return shards


def _derive(seed: int, purpose: str, position: int) -> int:
    return int(hash64(seed, purpose, position))
