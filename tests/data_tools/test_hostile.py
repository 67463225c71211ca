"""Hostile inputs, from the command line: each is a counted row with its reason, and the good rows become samples."""

import asyncio
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from tending import encode_noise
from test_fetch import Server, reply

from data_tools.shards import Manifest, ShardReader

ROOT = Path(__file__).resolve().parents[2]
GOOD = encode_noise(0, 64, 64)
MOST_BYTES = 900 * 10**6
"""Of memory, for a whole build of these."""


BUILD = """
import re, sys
from data_tools.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""
"""Tells its own peak in KiB: what the system counts for a child includes that of the process which started it."""


def build(*arguments: object) -> None:
    """`python -m data_tools build`, which has to end well, without a word of complaint and in little memory."""
    command = [sys.executable, "-c", BUILD, "build", *map(str, arguments), "--processes", "1", "--resize", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.splitlines()[-1]) * 1024 < MOST_BYTES


def list_outcomes(out: Path) -> dict[str, str]:
    """The reason of each row's failure, or "", by its source."""
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert len({row["source"] for row in rows}) == len(rows)
    counted = Counter()
    for path in out.glob("*_stats.json"):
        counted.update(json.loads(path.read_text())["failures_by_reason"])
    reasons = {row["source"]: (row["error"] or "").partition(": ")[0] for row in rows}
    assert counted == Counter(reason for reason in reasons.values() if reason)
    reader = ShardReader(Manifest.load(out))
    for number in range(len(reader)):
        with Image.open(io.BytesIO(reader.read(number).fields["jpg"])) as image:
            image.load()
    return {row["source"]: row["error"] or "" for row in rows}


def check(out: Path, expected: dict[str, str]) -> None:
    outcomes = list_outcomes(out)
    assert outcomes.keys() == expected.keys()
    wrong = {
        source: outcomes[source]
        for source, error in expected.items()
        if not outcomes[source].startswith(error) or bool(error) != bool(outcomes[source])
    }
    assert wrong == {}


def make_png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header tells of a size, and whose data may be another's."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def claim_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def test_pictures_captions_and_names(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(GOOD)
    many_scans = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(many_scans, "JPEG", progressive=True)
    scans = many_scans.getvalue()
    last_scan = scans[scans.rindex(b"\xff\xda") : -2]
    zeros = bytes(64 * (1 + 3 * 64))
    pictures = {
        "good.jpg": (GOOD, ""),
        "good.png": (make_png(64, 64, zeros), ""),
        "zero.jpg": (b"", "not a picture"),
        "page.jpg": (b"<!doctype html><title>404</title>", "not a picture"),
        "truncated.jpg": (GOOD[: len(GOOD) // 2], "damaged picture"),
        "no data.jpg": (GOOD[: GOOD.index(b"\xff\xda") + 14], "damaged picture"),
        "truncated.png": (make_png(64, 64, zeros)[:-30], "damaged picture"),
        "larger than it says.png": (make_png(8, 8, zeros), ""),  # as browsers show it: what is too much is left
        "smaller than it says.png": (make_png(640, 640, zeros), "damaged picture"),
        "smaller than it says.jpg": (claim_size(GOOD, 4000, 4000), "damaged picture"),
        "enormous.jpg": (claim_size(GOOD, 65000, 65000), "too many pixels"),
        "bomb.png": (make_png(30000, 30000, bytes(10**7)), "too many pixels"),
        "bomb of text.png": (
            make_png(64, 64, zeros, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))),
            "damaged picture",
        ),
        "bomb of data.png": (make_png(64, 64, bytes(3 * 10**8)), ""),
        "bomb of scans.jpg": (scans[:-2] + last_scan * 5000 + b"\xff\xd9", "damaged picture"),
        "svg.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9e9' height='9e9'/>", "not a picture"),
        "program.tif": (b"II*\0\x08\0\0\0", "not a picture"),
    }
    for name, (data, _) in pictures.items():
        (root / name).write_bytes(data)
    expected = {name: error for name, (_, error) in pictures.items()}
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    expected |= {
        "../secret.jpg": "image name leads out of the image root",
        str(tmp_path / "secret.jpg"): "image name leads out of the image root",
        f"file://{tmp_path}/secret.jpg": "image name leads out of the image root",
        "gopher://127.0.0.1/secret.jpg": "scheme refused",
        "loop.jpg": "unreadable picture",
        "a/b.jpg": "unreadable picture",
        "folder.jpg": "not a file",
        "pipe.jpg": "not a file",
        "none.jpg": "missing picture",
        "n" * 5000: "unreadable picture",
    }
    lines = [f"{name}\ta caption of {number}".encode() for number, name in enumerate(expected)]
    captions = {
        b"nul.jpg": (b"a \0 b", "no caption: caption with a NUL character"),
        b"long.jpg": (b"long " * 200_000, "no caption: caption of more than 100000 characters"),
        b"latin.jpg": (b"caf\xe9", "no caption: line that is not UTF-8 text"),
        b"empty.jpg": (b"  ", "no caption: empty caption"),
        b"cells.jpg": (b"one\ttwo", "no caption: row of 3 cells under a header of 2"),
        b"marks.jpg": (b"\xe2\x80\xae\x1b[31m\x07\xf0\x9f\x98\x80", ""),
    }
    for name, (caption, error) in captions.items():
        (root / name.decode()).write_bytes(GOOD)
        lines.append(name + b"\t" + caption)
        expected[name.decode()] = error
    lines.append(b"\0nul.jpg\tcaption")
    expected[f"line {len(lines) + 1}"] = "no caption: image name with a NUL character"
    lines.append(b"\xff\xfe.jpg\tcaption")
    expected["\\udcff\\udcfe.jpg"] = "no caption: line that is not UTF-8 text"
    (tmp_path / "table.tsv").write_bytes(b"\n".join([b"image\tcaption", *lines]))
    build(tmp_path / "table.tsv", tmp_path / "out", "--image-root", root, "--samples-per-shard", 7)
    check(tmp_path / "out", expected)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def test_servers(tmp_path, server):
    async def stall(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def drip_headers(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-Header: 1\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def pour(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            writer.write(bytes(2**16))
            await writer.drain()

    def redirect(location: str) -> bytes:
        return reply(status="302 Found", location=location)

    packed = gzip.compress(bytes(2 * 10**8))
    answers = {
        "/good.jpg": (reply(GOOD), ""),
        "/stalls.jpg": (stall, "time-out"),
        "/drips.jpg": (drip, "time-out"),
        "/drips-headers.jpg": (drip_headers, "time-out"),
        "/pours.jpg": (pour, "file too large"),
        "/longer.jpg": (reply(GOOD, length=len(GOOD) + 100), "answer cut off"),
        "/shorter.jpg": (reply(GOOD, length=len(GOOD) // 2), "unexpected answer"),
        "/huge.jpg": (reply(GOOD, length=10**15), "file too large"),
        "/nonsense-length.jpg": (reply(GOOD, length="-1"), "unexpected answer"),
        "/for-ever.jpg": (redirect("/for-ever.jpg"), "too many redirects"),
        "/to-file.jpg": (redirect("file:///etc/hostname"), "scheme refused"),
        "/to-nowhere.jpg": (reply(status="302 Found"), "unexpected answer"),
        "/page.jpg": (reply(b"<!doctype html>", content_type="image/jpeg"), "not a picture"),
        "/empty.jpg": (reply(b""), "not a picture"),
        "/packed.jpg": (reply(packed, content_encoding="gzip"), "file too large"),
        "/no-http.jpg": (b"\0\1\2\3" * 100, "unexpected answer"),
        "/gone.jpg": (reply(status="410 Gone"), "missing picture"),
        "/forbidden.jpg": (reply(status="403 Forbidden"), "access denied"),
        "/broken.jpg": (reply(status="500 Internal Server Error"), "server error"),
        "/not-for-us.jpg": (reply(GOOD, x_robots_tag="noai"), "opted out"),
        "/private/a.jpg": (reply(GOOD), "opted out"),
        "/robots.txt": (reply(b"User-agent: *\nDisallow: /private/"), None),
    }
    server.answers = {path: answer for path, (answer, _) in answers.items()}
    expected = {server.url(path): error for path, (_, error) in answers.items() if error is not None}
    expected |= {
        "http://[::1": "bad URL",
        "http://127.0.0.1:22/a.jpg": "bad URL",
        "http://" + "a" * 300 + "/a.jpg": "bad URL",
    }
    lines = [json.dumps({"url": url, "caption": f"caption {number}"}) for number, url in enumerate(expected)]
    (tmp_path / "urls.jsonl").write_text("\n".join(lines))
    options = ["--allow-private", "--timeout", 2, "--retries", 0, "--max-bytes", 2 * 10**6]
    build(tmp_path / "urls.jsonl", tmp_path / "out", *options)
    check(tmp_path / "out", expected)


def test_tars(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, target
            tar.addfile(info, io.BytesIO(data))

        for key in ("good", "../../up", "/etc/absolute", "good"):
            add(f"{key}.jpg", GOOD)
            add(f"{key}.txt", b"a caption")
        add("link.jpg", kind=tarfile.SYMTYPE, target="/etc/hostname")
        add("hard.jpg", kind=tarfile.LNKTYPE, target="good.jpg")
        add("device.jpg", kind=tarfile.CHRTYPE)
        add("pipe.jpg", kind=tarfile.FIFOTYPE)
        add("lonely.txt", b"no picture")
        add("latin.jpg", GOOD)
        add("latin.txt", b"caf\xe9")
        add("nul.jpg", GOOD)
        add("nul.txt", b"a\0b")
        add("deep.jpg", GOOD)
        add("deep.json", b"[" * 10**6)
        add("cut.jpg", GOOD)
    (tmp_path / "in.tar").write_bytes(stream.getvalue()[: stream.getvalue().index(b"cut.jpg") + 1024])
    before = set(tmp_path.parent.iterdir())
    build(tmp_path / "in.tar", tmp_path / "out")
    errors = {
        "good.jpg": "",
        "../../up.jpg": "",  # a label, and no path
        "/etc/absolute.jpg": "",
        "good.jpg#2": "",
        "link.jpg": "no caption: link in a tar",
        "hard.jpg": "no caption: link in a tar",
        "device.jpg": "no caption: device in a tar",
        "pipe.jpg": "no caption: device in a tar",
        "lonely": "no caption: captions without a picture",
        "latin.jpg": "no caption: caption that is not UTF-8 text",
        "nul.jpg": "no caption: caption with a NUL character",
        "deep.jpg": "no caption",
    }
    outcomes = list_outcomes(tmp_path / "out")
    cut = {source for source in outcomes if source.startswith("in.tar/byte ")}
    assert [outcomes.pop(source) for source in cut] == ["no caption: tar that is damaged or cut short from here on"]
    check_all = {f"in.tar/{name}": error for name, error in errors.items()}
    assert outcomes.keys() == check_all.keys()
    assert all(
        outcomes[name].startswith(error) and bool(outcomes[name]) == bool(error) for name, error in check_all.items()
    )
    assert set(tmp_path.parent.iterdir()) == before  # nothing was unpacked anywhere


def test_folders(tmp_path):
    """Links that lead in circles, out of the folder or nowhere, and names that are not UTF-8."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for name in (b"good", b"\xff\xfe", b"deep/too", b"without"):
        (Path(os.fsdecode(os.fsencode(root) + b"/" + name + b".jpg"))).write_bytes(GOOD)
        if name != b"without":
            (Path(os.fsdecode(os.fsencode(root) + b"/" + name + b".txt"))).write_bytes(b"a caption")
    (root / "self").symlink_to(".")
    (root / "deep" / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "nowhere.jpg").symlink_to("none.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (root / "secret.jpg").write_bytes(GOOD)
    (root / "secret.txt").symlink_to("/dev/zero")
    build(root, tmp_path / "out")
    outcomes = list_outcomes(tmp_path / "out")
    assert {name for name, error in outcomes.items() if not error} == {"good.jpg", "deep/too.jpg"}
    reasons = {name: error.removeprefix("no caption: ") for name, error in outcomes.items() if error}
    assert reasons == {
        "\\udcff\\udcfe.jpg": "image name that is not UTF-8 text",
        "without.jpg": "no caption",
        "loop.jpg": "link that leads nowhere",
        "nowhere.jpg": "link that leads nowhere",
        "pipe.jpg": "not a file",
        "secret.jpg": "caption file: not a file",
    }
