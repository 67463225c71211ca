"""Pipes: webdataset's stages, resampled shards, bad ones skipped and counted, no process or thread left."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from paths import ROOT
from stores import wait_for, write_shards

from data_tools.errors import UserError
from data_tools.shards import Manifest, ShardReader
from pretrain.config import ConfigError
from pretrain.data.streaming import StreamConfig, StreamReader, expand


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards(tmp_path / "data", shards=4, samples=5)
    return tmp_path / "data"


@pytest.fixture
def stream():
    readers = []

    def open_it(path: str, seed: int = 1, rank: int = 0, position: int = 0, **options) -> StreamReader:
        config = StreamConfig(**{"shuffle_samples": 8} | options)
        readers.append(StreamReader(path, config, seed=seed, rank=rank, position=position))
        return readers[-1]

    yield open_it
    for reader in readers:
        reader.close()


def take(reader: StreamReader, count: int) -> list:
    return list(itertools.islice(iter(reader), count))


def test_samples_are_those_of_the_shards(data, stream):
    local = {sample.key: sample.fields for sample in map(ShardReader(Manifest.load(data)).read, range(20))}
    taken = take(stream(f"pipe:cat {data}/{{00000..00003}}.tar"), 200)
    seen = Counter(sample.key for sample in taken)
    assert set(seen) == {f"{key[0]}_{key}" for key in local}  # the number of the shard before each
    assert all(sample.fields == local[sample.key.partition("_")[2]] for sample in taken)
    assert len([1 for one, other in itertools.pairwise(taken) if one.shard == other.shard]) < 120  # of 199: mixed


def test_the_order_depends_on_seed_rank_and_position_alone(data, stream):
    def keys(**options) -> list[str]:
        return [sample.key for sample in take(stream(f"pipe:cat {data}/{{00000..00003}}.tar", **options), 60)]

    first = keys()
    assert keys() == first
    others = [keys(seed=2), keys(rank=1), keys(position=60)]
    assert all(other != first for other in others)


def test_damaged_shards_and_failing_commands_are_skipped_and_counted(data, stream, caplog):
    content = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(content[: len(content) // 2])
    (data / "00002.tar").write_bytes(b"not an archive" * 1000)
    paths = [f"pipe:test {n:05d} != 00003 && cat {data}/{n:05d}.tar" for n in range(4)]
    reader = stream("::".join(paths))
    keys = {sample.key for sample in take(reader, 150)}
    assert reader.skipped > 3 and caplog.text.count("skipped") == 1
    assert {f"0_0_{place}" for place in range(5)} <= keys
    assert {key for key in keys if key.startswith("1_")} <= {"1_1_0", "1_1_1", "1_1_2"}  # whole ones before the damage
    assert not {key for key in keys if key[0] in "23"}


def test_a_command_that_fails_behind_a_whole_archive_is_told(data, stream):
    reader = stream(f"pipe:head -c 5632 {data}/00000.tar; exit 3")  # one sample, and no end of the archive
    with pytest.raises(UserError, match=r"10\d shards or samples in a row.*exit code 3"):
        take(reader, 1000)


def test_a_silent_command_is_given_up(data, stream):
    paths = [f"pipe:cat {data}/00000.tar", "pipe:sleep 60"]
    start_s = time.monotonic()
    reader = stream("::".join(paths), timeout_s=0.2, pipes=1)
    assert len(take(reader, 30)) == 30
    assert reader.skipped > 0 and time.monotonic() - start_s < 10


def test_nothing_but_bad_shards_ends_with_the_reason(stream):
    with pytest.raises(UserError, match=r"pipe:false.*10\d shards or samples in a row.*exit code 1") as caught:
        take(stream("pipe:false"), 1)
    assert "\n" not in str(caught.value)


def test_two_files_of_one_name_lose_only_the_second(tmp_path, stream):
    from data_tools.tar import ARCHIVE_END, render_member

    members = [("a.txt", b"one"), ("a.txt", b"two"), ("b.txt", b"three")]
    (tmp_path / "x.tar").write_bytes(b"".join(render_member(*member) for member in members) + ARCHIVE_END)
    reader = stream(f"pipe:cat {tmp_path}/x.tar", pipes=1, shuffle_samples=1)
    assert [sample.fields["txt"] for sample in take(reader, 4)] == [b"one", b"three"] * 2
    assert reader.skipped >= 2


def find_processes(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return [number for number in found if number != os.getpid()]


def test_close_ends_commands_with_their_children_and_threads(data, stream):
    word = f"61.{os.getpid()}"
    before = set(threading.enumerate())
    reader = stream(f"pipe:cat {data}/00000.tar; (sleep {word} | cat); true", pipes=2)
    wait_for(lambda: len(find_processes(word)) >= 4)
    start_s = time.monotonic()
    reader.close()
    assert time.monotonic() - start_s < 5
    wait_for(lambda: not find_processes(word))
    assert not set(threading.enumerate()) - before


INTERRUPTED = """
import sys
from pretrain.data.streaming import StreamConfig, StreamReader
reader = StreamReader(sys.argv[1], StreamConfig(shuffle_samples=1), seed=0, rank=0)
for sample in reader:
    print(sample.key, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_commands_end_with_their_process_even_without_close(number, data):
    word = f"62.{os.getpid()}"
    command = [sys.executable, "-c", INTERRUPTED, f"pipe:cat {data}/00000.tar; sleep {word} | cat; true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("0_0_")
    wait_for(lambda: len(find_processes(word)) >= 3)  # ours and two shells
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not find_processes(word))


def test_a_command_may_wait_for_its_own_jobs(data, stream):
    started_s = time.monotonic()
    command = f'pipe:cat {data}/00000.tar & wait; read -r line; test -z "$line" || exit 1'
    assert len(take(stream(command, shuffle_samples=1, timeout_s=5.0), 30)) == 30 and time.monotonic() - started_s < 20


def test_paths_are_expanded_as_webdataset_does(monkeypatch):
    monkeypatch.setenv("WDS_BUCKET", "b")
    assert expand("pipe:aws s3 cp s3://${BUCKET}/{000..001}.tar -") == [
        "pipe:aws s3 cp s3://b/000.tar -",
        "pipe:aws s3 cp s3://b/001.tar -",
    ]
    for path, text in (
        ("pipe:cat {0..2.tar", "its braces do not match"),
        ("pipe:cat a.tar::b.tar", "every part between"),
        ("pipe:cat ${NOWHERE}", "WDS_NAME"),
    ):
        with pytest.raises(ConfigError, match=text):
            expand(path)
