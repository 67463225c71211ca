"""Servers that fail, and work again: what heals is added, what is there stays; and hostile inputs, end to end."""

import asyncio
import itertools
import json
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from killing import Killer, hash_files
from tending import encode_noise
from test_fetch import NOT_FOUND, Server, reply

from data_tools.__main__ import main
from data_tools.build import build_shards, retry_failures
from data_tools.errors import UserError
from data_tools.fetch import FetchOptions
from data_tools.image import ImagePolicy
from data_tools.shards import Manifest, ShardReader
from data_tools.verify import verify_dataset
from data_tools.view import make_view

FETCH = {"allow_private": True, "timeout_s": 1.0, "retries": 0, "backoff_s": 0.01}
COUNT = 20
DOWN = reply(status="500 Internal Server Error")
OPTED_OUT = reply(b"x", x_robots_tag="noai")
REWRITTEN = {"manifest.json", "sizes.json", "checksums.json"}


async def stall(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")
    await writer.drain()
    writer.transport.abort()


@pytest.fixture
def server():
    server = Server()
    server.answers["/robots.txt"] = NOT_FOUND
    for number in range(COUNT):
        server.answers[f"/{number}.jpg"] = answer_with(number)
    yield server
    server.close()


def answer_with(number: int) -> bytes:
    return reply(encode_noise(number, 40 + number))


@pytest.fixture
def table(tmp_path, server) -> Path:
    """Pictures behind URLs, each with two captions and another column."""
    lines = ["url\tcaption\tlicence"]
    for number in range(COUNT):
        lines += [f"{server.url(f'/{number}.jpg')}\t{word} {number}\tcc-{number}" for word in ("noise", "a picture")]
    (tmp_path / "urls.tsv").write_text("\n".join(lines))
    return tmp_path / "urls.tsv"


def build(table: Path, out: Path, samples_per_shard: int = 6) -> Manifest:
    options = {"images": ImagePolicy(resize=32), "fetch": FetchOptions(**FETCH), "processes": 1}
    return build_shards(table, out, samples_per_shard=samples_per_shard, **options)


def list_sources(out: Path) -> list[str]:
    """The source of each sample, as the loader reads them."""
    reader = ShardReader(Manifest.load(out))
    return [json.loads(reader.read(number).fields["json"])["source"] for number in range(len(reader))]


def name(source: str) -> int:
    return int(source.rpartition("/")[2].removesuffix(".jpg"))


def count_failures(out: Path, capsys) -> Counter:
    """Failures by reason, as `info` tells them."""
    capsys.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(facts["failures_by_reason"].values()) == facts["failures"]
    return Counter(facts["failures_by_reason"])


def test_what_heals_is_added_and_what_is_there_stays(tmp_path, server, table, capsys):
    out = tmp_path / "out"
    bad = {1: DOWN, 2: stall, 3: reset, 7: DOWN, 8: NOT_FOUND, 9: OPTED_OUT, 14: DOWN, 15: stall, 16: DOWN}
    for number, answer in bad.items():
        server.answers[f"/{number}.jpg"] = answer
    manifest = build(table, out)
    assert (manifest.samples, manifest.failures, manifest.captions) == (11, 9, 22)
    assert count_failures(out, capsys) == Counter(
        {"server error": 4, "time-out": 2, "answer cut off": 1, "missing picture": 1, "opted out": 1}
    )
    before = hash_files(out)
    for number in (1, 2, 3, 7, 8, 9, 15):  # 14 and 16 stay as they are
        server.answers[f"/{number}.jpg"] = answer_with(number)
    server.answers["/16.jpg"] = NOT_FOUND
    server.requests.clear()

    capsys.readouterr()
    manifest = retry_failures(out, processes=1)
    assert f"{out}: 5 of 7 healed, in 2 added shards; 4 failures are left" in capsys.readouterr().out
    assert {name(path) for path in server.requests if path != "/robots.txt"} == {1, 2, 3, 7, 14, 15, 16}
    assert (manifest.samples, manifest.failures, manifest.captions) == (16, 4, 32)
    after = hash_files(out)
    assert {file for file in before if after[file] != before[file]} == REWRITTEN
    added = {
        f"{stem}{suffix}" for stem in ("00004", "00005") for suffix in (".tar", ".tar.idx", ".parquet", "_stats.json")
    }
    assert set(after) - set(before) == added

    assert [name(source) for source in list_sources(out)] == [0, 4, 5, 6, 10, 11, 12, 13, 17, 18, 19, 1, 2, 3, 7, 15]
    sample = json.loads(ShardReader(manifest).read(14).fields["json"])
    assert (sample["captions"], sample["licence"]) == (["noise 7", "a picture 7"], "cc-7")
    assert count_failures(out, capsys) == Counter({"missing picture": 2, "opted out": 1, "server error": 1})
    assert verify_dataset(out, decode=True, processes=1)
    view = make_view(out, tmp_path / "view", "licence in ('cc-7', 'cc-4', 'cc-14')")
    assert [name(source) for source in list_sources(tmp_path / "view")] == [4, 7] and view.samples == 2
    assert count_failures(tmp_path / "view", capsys) == Counter()

    server.requests.clear()
    assert retry_failures(out, processes=1).failures == 4  # 14 fails again: nothing new to tell
    assert [path for path in server.requests if path != "/robots.txt"] == ["/14.jpg"]
    assert hash_files(out) == after
    server.answers["/14.jpg"] = answer_with(14)
    manifest = retry_failures(out, processes=1)
    assert (manifest.samples, manifest.failures) == (17, 3)
    assert count_failures(out, capsys) == Counter({"missing picture": 2, "opted out": 1})
    assert verify_dataset(out, processes=1)
    after = hash_files(out)
    server.requests.clear()
    retry_failures(out, processes=1)
    assert f"{out}: none of its 3 failures is of a kind that can heal" in capsys.readouterr().out
    assert (server.requests, hash_files(out)) == ([], after)


def test_an_added_shard_takes_no_other_ones_name(tmp_path, server, table, capsys):
    """Also where an earlier retry has added nothing for the shard between two others."""
    out = tmp_path / "out"
    failing = range(12, 18)
    for number in failing:
        server.answers[f"/{number}.jpg"] = DOWN
    build(table, out, samples_per_shard=2)
    for number in (12, 13, 16, 17):
        server.answers[f"/{number}.jpg"] = answer_with(number)
    first = retry_failures(out, processes=2)
    assert [shard.name for shard in first.shards[-3:]] == ["00009.tar", "00010.tar", "00012.tar"]
    before = hash_files(out)
    for number in failing:
        server.answers[f"/{number}.jpg"] = answer_with(number)
    second = retry_failures(out, processes=1)
    assert [shard.name for shard in second.shards[-2:]] == ["00012.tar", "00013.tar"]
    after = hash_files(out)
    assert {file for file in before if after[file] != before[file]} == REWRITTEN
    assert sorted(map(name, list_sources(out))) == list(range(COUNT)) and second.failures == 0
    assert verify_dataset(out, processes=1)
    keys = [ShardReader(second).read(number).key for number in range(COUNT)]
    assert len(set(keys)) == COUNT


def test_a_retry_that_is_killed_leaves_a_dataset_and_ends_with_the_same_bytes(tmp_path, server, table):
    draw = random.Random(3)
    killer = Killer(draw, tmp_path, ("retry.json", "manifest.json", "00005.", "00006_", "sizes.json", "checksums"))
    for number in range(3, COUNT):
        server.answers[f"/{number}.jpg"] = DOWN
    built = tmp_path / "built"
    build(table, built, samples_per_shard=4)
    for number in range(3, COUNT):
        server.answers[f"/{number}.jpg"] = answer_with(number) if number not in (9, 10, 11, 12, 15) else DOWN
    whole = tmp_path / "whole"
    shutil.copytree(built, whole)
    killer.measure(["retry", whole, "--processes", 1])
    expected = hash_files(whole)
    processes = itertools.cycle([1, 2, 1])
    turn = 0
    while killer.kills < 8:
        out = tmp_path / f"out {turn}"
        shutil.copytree(built, out)
        turn += 1
        while not killer.run_or_kill(["retry", out, "--processes", next(processes)]):
            manifest = Manifest.load(out)
            assert len(list_sources(out)) == manifest.samples in (3, 15)
            assert (manifest.samples == 3) == ("retried" not in manifest.options)
            if (out / "retry.json").exists():
                with pytest.raises(UserError, match="a `retry` has begun here and not finished. Run it again"):
                    verify_dataset(out, processes=1)
        # A retry that was killed at its very end has nothing left to do but to remove its mark.
        killer.start(["retry", out, "--processes", 1]).succeed()
        assert hash_files(out) == expected


def test_beginning_anew_removes_added_shards_whenever_it_is_killed(tmp_path, server, table):
    killer = Killer(random.Random(0), tmp_path)
    for number in (4, 5):
        server.answers[f"/{number}.jpg"] = DOWN
    out = tmp_path / "out"
    build(table, out)
    for number in (4, 5):
        server.answers[f"/{number}.jpg"] = answer_with(number)
    retry_failures(out, processes=1)
    assert (out / "00004.tar").exists()
    build(table, tmp_path / "whole")
    again = ["build", table, out, "--samples-per-shard", 6, "--resize", 32, "--processes", 1, "--restart"]
    again += ["--allow-private", "--timeout", 1, "--retries", 0]
    for ends_at, word in (
        (1, "retry.json"),
        (2, "manifest.json"),
        (1, "00003.tar"),
        (1, "00004.tar"),
        (3, "retry.json"),
    ):
        assert killer.start([*again, "--timeout", 1], ends_at, word, True).end() == -signal.SIGKILL, word
    killer.start(again).succeed()
    found, expected = hash_files(out), hash_files(tmp_path / "whole")
    del found["build.json"], expected["build.json"]  # it tells of the options of downloads, as they were given
    del found["checksums.json"], expected["checksums.json"]
    assert found == expected


def test_a_damaged_shard_is_made_again_beside_added_ones(tmp_path, server, table, capsys):
    server.answers["/1.jpg"] = DOWN
    out = tmp_path / "out"
    build(table, out)
    server.answers["/1.jpg"] = answer_with(1)
    retry_failures(out, processes=1)
    before = hash_files(out)
    (out / "manifest.json").unlink()
    (out / "00002.tar").unlink()
    build(table, out)
    assert hash_files(out) == before
    (out / "manifest.json").unlink()
    (out / "00000.tar").unlink()  # it will hold what was added, too
    build(table, out)
    assert "removed 1 shards that `retry` had added to others than these. Run it again" in capsys.readouterr().out
    assert sorted(map(name, list_sources(out))) == list(range(COUNT))
    assert not list(out.glob("00004*"))


def test_only_a_build_can_be_retried(tmp_path, server, table):
    with pytest.raises(UserError, match="no manifest.json: is it a finished build"):
        (tmp_path / "empty").mkdir()
        retry_failures(tmp_path / "empty", processes=1)
    build(table, tmp_path / "out")
    make_view(tmp_path / "out", tmp_path / "view", "true")
    with pytest.raises(UserError, match="holds files but no build"):
        retry_failures(tmp_path / "view", processes=1)
