"""Builds are exact: random inputs, any number of processes and tasks, killed at any instant, end with the same bytes."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from killing import Command, Killer, hash_files
from PIL import Image

from data_tools.__main__ import main
from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.image import ImagePolicy
from data_tools.shards import Manifest
from data_tools.tables import TsvSource
from data_tools.tar import ARCHIVE_END, render_member

ROOT = Path(__file__).resolve().parents[2]
WORDS = 'a dog ein Hund 一只狗 собака runs über the grass & sand é \u2028 <b> "quoted" it\'s 100%'.split(" ")


# Random inputs


def draw_picture(draw: random.Random) -> bytes:
    """A small picture of noise in one of several formats, and sometimes a damaged one."""
    width, height = draw.randint(8, 56), draw.randint(8, 56)
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    mode, format = draw.choice(
        [("RGB", "JPEG")] * 6 + [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "GIF"), ("RGB", "WEBP")]
    )
    Image.fromarray(pixels).convert(mode).save(stream, format)
    data = stream.getvalue()
    return draw.choice([data] * 12 + [data[: len(data) // 2], b"", b"<html>", data[:20] + bytes(30)])


def draw_caption(draw: random.Random) -> str:
    text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9)))
    return draw.choice([text] * 14 + ["", "   ", "spam " + text, "w " * 300, "x\0y", text + "&amp;quot;"])


def draw_rows(draw: random.Random) -> list[dict]:
    """Rows with pictures that are missing, damaged or the same as others', and with none, one or several captions."""
    pictures = [draw_picture(draw) for _ in range(draw.randint(12, 18))]
    rows = []
    for number, data in enumerate(pictures):
        data = draw.choice([data] * 9 + [pictures[0]])
        captions = [draw_caption(draw) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
        extra = {"licence": draw.choice(["cc0", "by", ""]), "likes": draw.choice([number, None]), "score": number / 7}
        present = draw.random() > 0.1
        rows.append({"name": f"d{number % 3}/p {number}.jpg", "data": data if present else None} | extra)
        rows[-1]["captions"] = captions
    return rows


def write_pictures(folder: Path, rows: list[dict]) -> Path:
    for row in rows:
        if row["data"] is not None:
            path = folder / "images" / row["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["data"])
    return folder / "images"


def write_text_table(folder: Path, rows: list[dict], draw: random.Random, kind: str) -> list:
    """One row a caption, those of a picture not always side by side."""
    table = [
        [row["name"], caption, row["licence"], "" if row["likes"] is None else str(row["likes"])]
        for row in rows
        for caption in row["captions"]
    ]
    for _ in range(3):
        table.insert(draw.randrange(len(table)), table.pop(draw.randrange(len(table))))
    table.insert(draw.randrange(len(table)), ["../outside.jpg", "up", "by", "3"])
    header = ["image", "caption", "licence", "key"]  # the last is a name of ours
    stream = io.StringIO()
    if kind == "csv":
        csv.writer(stream).writerows([header, *table])
    else:
        stream.write("\n".join("\t".join(" ".join(cell.split("\t")) for cell in line) for line in [header, *table]))
    data = stream.getvalue().encode() + draw.choice([b"", b"\nbroken row\n", b"\nd0/p 0.jpg,\xff\xfe\n"])
    path = folder / f"table.{kind}{draw.choice(['', '.gz'])}"
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return [path, "--image-root", write_pictures(folder, rows)]


def write_jsonl(folder: Path, rows: list[dict], draw: random.Random) -> list:
    lines = [
        json.dumps({"url": row["name"], "caption": row["captions"], "likes": row["likes"], "at": {"x": row["score"]}})
        for row in rows
    ]
    lines.insert(draw.randrange(len(lines)), draw.choice(["{", "[]", '{"url": 3, "caption": "x"}', "\0"]))
    (folder / "table.jsonl").write_text("\n".join(lines))
    return [folder / "table.jsonl", "--image-root", write_pictures(folder, rows)]


def write_parquet(folder: Path, rows: list[dict], draw: random.Random) -> list:
    """Pictures inside of it, in row groups of a few."""
    columns = {
        "image": [row["data"] for row in rows],
        "captions": [row["captions"] for row in rows],
        "likes": [row["likes"] for row in rows],
        "score": [row["score"] for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "p.parquet", row_group_size=draw.randint(2, 9))
    return [folder / "p.parquet"]


def write_tars(folder: Path, rows: list[dict], draw: random.Random) -> list:
    """Keys with dots and keys that come again, samples that are not whole, a name that leads out, a link."""
    cut = draw.randrange(1, len(rows))
    for number, part in enumerate((rows[:cut], rows[cut:])):
        content = io.BytesIO()
        with tarfile.open(
            fileobj=content, mode="w", format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        ) as tar:

            def add(name: str, data: bytes, tar=tar) -> None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

            for row in part:
                key = row["name"].removesuffix(".jpg").replace(" ", draw.choice(["_", "."]))
                if row["data"] is not None:
                    add(f"{key}.jpg", row["data"])
                add(f"{key}.txt", row["captions"][0].encode())
                add(f"{key}.json", json.dumps({"captions": row["captions"], "score": row["score"]}).encode())
            add("../../up.jpg", rows[0]["data"] or b"x")
            add("../../up.txt", b"up")
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(link)
        (folder / f"part-{number}.tar").write_bytes(content.getvalue())
    return [folder / "part-{0..1}.tar"]


def write_folder(folder: Path, rows: list[dict], draw: random.Random) -> list:
    images = write_pictures(folder, rows)
    for row in rows:
        stem = (images / row["name"]).with_suffix("")
        stem.parent.mkdir(parents=True, exist_ok=True)
        if len(row["captions"]) > 1 or draw.random() < 0.3:
            stem.with_suffix(".json").write_text(json.dumps({"captions": row["captions"], "score": row["score"]}))
        elif draw.random() < 0.9:
            stem.with_suffix(".txt").write_text(row["captions"][0])
    (images / "loop").symlink_to("loop")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "again").symlink_to(".")
    return [images]


KINDS = {
    "tsv": lambda *parts: write_text_table(*parts, "tsv"),
    "csv": lambda *parts: write_text_table(*parts, "csv"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "tar": write_tars,
    "folder": write_folder,
}


def draw_build(folder: Path, kind: str, draw: random.Random) -> list[str]:
    """Write a random input and return the arguments of its build, without OUT."""
    folder.mkdir()
    (folder / "block.txt").write_text("spam\n")
    source, *rest = KINDS[kind](folder, draw_rows(draw), draw)
    options = ["--samples-per-shard", draw.randint(3, 4), "--resize", draw.choice([0, 24, 40])]
    options += ["--resize-mode", draw.choice(["keep_ratio", "center_crop", "border", "squash"])]
    options += ["--format", draw.choice(["jpg", "jpg", "webp", "png"]), "--max-words", 100]
    options += ["--blocklist", folder / "block.txt", *draw.choice([[], ["--fix-text"]])]
    options += draw.choice([[], ["--seed", draw.randrange(9)]])
    return [str(argument) for argument in ("build", source, *rest, *options)]


# Kills

ROUNDS = [
    ("tsv", 1, "build"),
    ("csv", 2, "tasks"),
    ("jsonl", 3, "tasks"),
    ("parquet", 4, "build"),
    ("tar", 5, "tasks"),
    ("folder", 6, "restart"),
]
KILLS = 50
"""Altogether."""


@pytest.mark.parametrize(
    ("kind", "seed", "way"),
    [pytest.param(*each, marks=[pytest.mark.faults] if each[1] < 5 else []) for each in ROUNDS],
)
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, kind, seed, way):
    draw = random.Random(seed)
    killer = Killer(draw, tmp_path)
    build = draw_build(tmp_path / "in", kind, draw)
    killer.measure([*build, tmp_path / "whole", "--processes", 1])
    expected = hash_files(tmp_path / "whole")
    assert len(expected) > 3 * 4 and Manifest.load(tmp_path / "whole").failures
    if way == "restart":
        build = [*build, "--restart"]
        main([*draw_build(tmp_path / "other", "tsv", draw), str(tmp_path / "before"), "--processes", "1"])
    processes = itertools.cycle(draw.sample(["1"] * 6 + ["2", "3", "4"], 9))
    wanted, turn = -(-KILLS // len(ROUNDS)), 0
    while killer.kills < wanted:
        out = tmp_path / f"out {turn}"
        turn += 1
        if way == "restart":
            shutil.copytree(tmp_path / "before", out)
        commands = [[*build, out]]
        if way == "tasks":
            tasks = draw.randint(2, 3)
            commands = [[*build, out, "--task", f"{number}/{tasks}"] for number in range(1, tasks + 1)]
            draw.shuffle(commands)
        while commands:
            command = [*commands[0], "--processes", next(processes)]
            beside = commands[1:2] if draw.random() < 0.5 else []  # another task at the same time
            others = [killer.start([*task, "--processes", "1"]) for task in beside]
            if killer.kills >= wanted:
                killer.start(command).succeed()
                done = True
            else:
                done = killer.run_or_kill(command)
            for command in others:
                command.succeed()
            commands = commands[int(done) : 1] + commands[1 + len(beside) :]
        if way == "tasks":
            assert not (out / "manifest.json").exists()
            while not killer.run_or_kill(["finish", out]):
                pass
        assert hash_files(out) == expected


# Others at work at the same time


def wait_until(condition, *commands: Command) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        assert all(command.process.is_alive() for command in commands), [command.output for command in commands]
        time.sleep(0.002)


def stop_while(command: Command, pattern: str, out: Path) -> None:
    """Stop the command (SIGSTOP) as soon as a file of this name pattern lies in OUT."""
    wait_until(lambda: any(out.glob(pattern)), command)
    os.kill(command.pid, signal.SIGSTOP)


@pytest.fixture
def killer(tmp_path):
    return Killer(random.Random(0), tmp_path)


@pytest.fixture
def large_build(tmp_path, write_table) -> tuple[list, dict[str, str]]:
    """A build of one process that takes a while, and the hashes of what comes of it."""
    table, images = write_table(40, size=500)
    build = ["build", table, "--image-root", images, "--samples-per-shard", 10, "--processes", 1]
    assert main([str(argument) for argument in [*build, tmp_path / "whole"]]) == 0
    return build, hash_files(tmp_path / "whole")


def run_here(capsys, *arguments) -> tuple[int, str, str]:
    """The exit code of a command in this process, and what it prints to stdout and to stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_build_next_to_a_running_one_is_refused(tmp_path, killer, large_build, capsys):
    build, expected = large_build
    out = tmp_path / "out"
    running = killer.start([*build, out])
    stop_while(running, "00001.tar", out)
    try:
        for command in ([*build, out], [*build, out, "--task", "1/2"], ["finish", out], ["retry", out]):
            error = f"error: {out}: another process is writing here. Wait for it to end, or end it\n"
            assert run_here(capsys, *command) == (2, "", error)
    finally:
        os.kill(running.pid, signal.SIGCONT)
    running.succeed()
    assert hash_files(out) == expected


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="looks for a waiting process in /proc/locks")
def test_the_same_task_twice_at_once_makes_each_shard_once(tmp_path, killer, large_build):
    build, expected = large_build
    out = tmp_path / "out"
    task = [*build, out, "--task", "1/2"]
    first = killer.start(task)
    stop_while(first, "00000.tar.*.tmp", out)
    try:
        half = next(out.glob("00000.tar.*.tmp"))
        second = killer.start(task)
        waiting = f" {second.pid} "
        wait_until(
            lambda: any("->" in line and waiting in line for line in Path("/proc/locks").read_text().splitlines()),
            second,
        )
        assert half.exists()  # what another process is writing is no leftover
        killer.start([*build, out, "--task", "2/2"]).succeed()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.succeed()
    second.succeed()
    times = [(out / f"0000{shard}.tar").stat().st_mtime_ns for shard in (0, 2)]
    assert times == sorted(times)
    killer.start(["finish", out]).succeed()
    assert hash_files(out) == expected


def test_a_task_that_was_killed_leaves_nothing_to_those_after_it(tmp_path, killer, large_build):
    build, expected = large_build
    out = tmp_path / "out"
    # Before the index is begun, before the tar and before the index get their names. What an earlier one left is removed
    # first, which counts. plan.tmp is among what is left.
    for ends_at, left in ((2, 2), (4, 5), (6, 4)):
        killed = killer.start([*build, out, "--task", "1/2"], ends_at, "00000.tar.", True)
        assert killed.end() == -signal.SIGKILL
        assert len(list(out.glob("*.tmp"))) == left
    killer.start([*build, out, "--task", "1/2"]).succeed()
    assert [path.name for path in out.glob("*.tmp")] == ["plan.tmp"]
    (out / "manifest.json.0123abcd.tmp").write_bytes(b"{")
    killer.start([*build, out, "--task", "2/2"]).succeed()
    killer.start(["finish", out]).succeed()
    assert hash_files(out) == expected


# Inputs and folders that are not what they were


def test_an_input_that_changes_in_mid_build_is_noticed(tmp_path, killer, large_build, capsys):
    build, expected = large_build
    table, out = build[1], tmp_path / "out"
    assert killer.start([*build, out], 3, "00002.tar", True).end() == -signal.SIGKILL
    before = table.read_bytes()
    table.write_bytes(before + b"picture 1.jpg\tanother\n")
    code, _, error = run_here(capsys, *build, out)
    assert code == 2 and error.count("\n") == 1
    assert f"{out}: holds a build with input_sha256" in error and "--restart" in error
    _, _, error = run_here(capsys, *build, out, "--quality", 80, "--seed", 3)
    assert "seed None, not 3; images.quality 90, not 80" in error
    table.write_bytes(before)
    killer.start([*build, out]).succeed()
    assert hash_files(out) == expected


def test_a_table_that_changes_while_it_is_planned_is_refused(tmp_path, write_table, monkeypatch):
    table, images = write_table(3)
    rows = TsvSource.rows

    def rows_then_change(source):
        yield from rows(source)
        with open(table, "a") as file:
            file.write("picture 0.jpg\tlate\n")

    monkeypatch.setattr(TsvSource, "rows", rows_then_change)
    with pytest.raises(UserError, match="table.tsv: changed while it was read. Run again"):
        build_shards(table, tmp_path / "out", images, processes=1)
    assert os.listdir(tmp_path / "out") == []


def test_a_tar_that_changes_while_its_pictures_are_read_is_refused(tmp_path, killer, noise):
    content = b""
    for number in range(30):
        stream = io.BytesIO()
        noise(300, 300, number).save(stream, "JPEG")
        content += render_member(f"{number}.jpg", stream.getvalue()) + render_member(f"{number}.txt", b"noise")
    tar = tmp_path / "in.tar"
    tar.write_bytes(content + ARCHIVE_END)
    build = ["build", tar, "--samples-per-shard", 10, "--processes", 1]
    killer.start([*build, tmp_path / "whole"]).succeed()
    out = tmp_path / "out"
    running = killer.start([*build, out])
    stop_while(running, "00001.tar.*.tmp", out)
    tar.write_bytes(bytes(1024) + content + ARCHIVE_END)
    os.kill(running.pid, signal.SIGCONT)
    assert running.end() == 2
    assert "in.tar: changed while it was read. Run again, with --restart if a build has begun" in running.output
    assert not list(out.glob("00001_stats.json")) and not (out / "manifest.json").exists()
    tar.write_bytes(content + ARCHIVE_END)
    killer.start([*build, out]).succeed()
    assert hash_files(out) == hash_files(tmp_path / "whole")


# Full disks and stores

FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
from data_tools.__main__ import main

disk, table, images, kept = map(Path, sys.argv[1:])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4000k", "tmpfs", disk]).returncode:
    sys.exit(9)
build = ["build", table, disk / "out", "--image-root", images, "--samples-per-shard", 10, "--processes", 1]
for free in (8, 14, 24, 300):
    shutil.rmtree(disk / "out", ignore_errors=True)
    (disk / "filler").write_bytes(bytes((4000 - free) * 1024))
    code = main([str(argument) for argument in build])
    print(f"with {free}: {code}, manifest: {(disk / 'out' / 'manifest.json').exists()}")
    (disk / "filler").unlink()
    print(f"then: {main([str(argument) for argument in build])}")
    shutil.copytree(disk / "out", kept / str(free))
"""


def test_a_disk_that_is_full_while_planning_stops_the_build_and_a_second_run_goes_on(tmp_path, write_table):
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a mount namespace of its own for a small file system")
    table, images = write_table(100)
    (tmp_path / "disk").mkdir()
    command = [*unshare, sys.executable, "-c", FULL_DISK, tmp_path / "disk", table, images, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    if run.returncode == 9:
        pytest.skip("may not mount a small file system")
    told = [line for line in run.stdout.splitlines() if line.startswith(("with", "then"))]
    ends = ((f"with {free}: 1, manifest: False", "then: 0") for free in (8, 14, 24, 300))
    assert told == [line for pair in ends for line in pair], run
    assert len(run.stderr.splitlines()) == 4
    assert run.stderr.count("the disk is full. Free space and run the same command again") == 4, run.stderr
    build_shards(table, tmp_path / "whole", images, samples_per_shard=10, processes=1)
    for free in ("8", "14", "24", "300"):
        assert hash_files(tmp_path / free) == hash_files(tmp_path / "whole")


def read_store(url: str) -> dict[str, bytes]:
    """Every object below a URL, by its name."""
    system, path = fsspec.core.url_to_fs(url)
    return {name.rpartition("/")[2]: system.cat_file(name) for name in system.find(path)}


@pytest.fixture
def store():
    yield "memory://exact/shards"
    fsspec.filesystem("memory").rm("/exact", recursive=True)


def test_a_store_gets_the_bytes_of_a_folder(tmp_path, write_table, read_folder, store, capsys):
    table, images = write_table(12)
    options = {"samples_per_shard": 5, "seed": 1, "images": ImagePolicy(resize=32), "processes": 1}
    build_shards(table, tmp_path / "out", images, **options)
    build_shards(table, store, images, **options)
    expected = read_folder(tmp_path / "out")
    assert read_store(store) == expected
    assert Manifest.load(store).fingerprint == Manifest.load(tmp_path / "out").fingerprint
    build_shards(table, f"file://{tmp_path}/url", images, **options | {"processes": 2})
    assert read_folder(tmp_path / "url") == expected
    capsys.readouterr()
    build_shards(table, store, images, **options)
    assert "memory://exact/shards: this build is finished already, with 12 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="memory://exact/shards: holds a build with seed 1, not 2"):
        build_shards(table, store, images, **options | {"seed": 2})


def test_a_store_that_fails_in_mid_build_is_gone_on_with(tmp_path, write_table, read_folder, store, monkeypatch):
    """At each of its operations in turn, once; what it has half is not taken for whole, nor left behind."""
    table, images = write_table(4)
    options = {"samples_per_shard": 2, "processes": 1}
    build_shards(table, tmp_path / "out", images, **options)
    kind = fsspec.get_filesystem_class("memory")
    calls, fails_at = 0, 0

    def failing(function):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls >= fails_at > 0:  # the store stays away
                raise ConnectionError("the store is gone")
            return function(*arguments, **named)

        return call

    for name in ("_open", "cp_file", "rm_file", "info"):
        monkeypatch.setattr(kind, name, failing(getattr(kind, name)))
    failures = 0
    while True:
        calls, fails_at = 0, failures + 1
        try:
            build_shards(table, store, images, **options, restart=failures % 5 == 4)
            break
        except ConnectionError:
            failures += 1
    assert failures > 30
    assert read_store(store) == read_folder(tmp_path / "out")


def test_a_build_to_a_url_that_is_killed_goes_on(tmp_path, killer, large_build):
    build, expected = large_build
    out = f"file://{tmp_path}/out"
    for ends_at, word in ((2, "00001.tar"), (1, "00002.parquet"), (3, "00002.tar"), (2, "manifest.json")):
        assert killer.start([*build, out], ends_at, word, True).end() == -signal.SIGKILL
    killer.start([*build, out]).succeed()
    assert hash_files(tmp_path / "out") == expected
