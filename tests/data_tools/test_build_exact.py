"""Builds are exact: random inputs, any number of processes and tasks, killed at any instant, end with the same bytes."""

import csv
import gzip
import io
import itertools
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from killing import Killer, hash_files
from PIL import Image

from data_tools.__main__ import main
from data_tools.shards import Manifest

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
    pictures = [draw_picture(draw) for _ in range(draw.randint(16, 30))]
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
    options = ["--samples-per-shard", draw.randint(3, 6), "--resize", draw.choice([0, 24, 40])]
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


@pytest.mark.parametrize(("kind", "seed", "way"), ROUNDS)
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
    processes = itertools.cycle(["2", "1", "3", "1", "4", "1"])
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
