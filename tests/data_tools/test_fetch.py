"""Pictures by name, from a folder, from object stores, and from a server on this machine that does its worst."""

import asyncio
import contextlib
import email.utils
import gc
import gzip
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from data_tools import fetch
from data_tools.errors import UserError
from data_tools.fetch import HEALABLE, FetchError, FetchOptions, fetch_all, is_public, read_picture
from data_tools.image import PictureError

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Answers raw bytes on 127.0.0.1; `answers` has, by path, bytes, a list of them in turn, or a coroutine function."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {}
        self.requests: list[str] = []
        self.heads: list[str] = []
        self.now = self.most = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def count(self, path: str) -> int:
        return self.requests.count(path)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            self.requests.append(path)
            self.heads.append(head)
            answer = self.answers.get(path, NOT_FOUND)
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                if callable(answer):
                    await answer(writer)
                else:
                    writer.write(answer)
                    await writer.drain()
            finally:
                self.now -= 1
                writer.close()


def reply(body: bytes = b"", status: str = "200 OK", length: object = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


NOT_FOUND = reply(status="404 Not Found")
OPTIONS = {"allow_private": True, "backoff_s": 0.01, "retries": 1}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


@pytest.fixture
def name_server(monkeypatch):
    """Host names and the addresses, or the errors, that getaddrinfo is to have for them, in turn."""
    names: dict[str, list] = {}
    real, asked = socket.getaddrinfo, []

    def look_up(host, *arguments):
        if host not in names:
            return real(host, *arguments)
        asked.append(host)
        answer = names[host].pop(0) if len(names[host]) > 1 else names[host][0]
        if isinstance(answer, Exception):
            raise answer
        family = socket.AF_INET6 if ":" in answer else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (answer, 0, 0, 0)[: 4 if ":" in answer else 2])]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    names["asked"] = asked
    return names


def get(server: Server, path: str, **options) -> bytes | FetchError:
    (result,) = fetch_all([server.url(path)], FetchOptions(**{**OPTIONS, **options}))
    return result


def refusal(server: Server, path: str, **options) -> str:
    """The reason why the picture was not to be had."""
    result = get(server, path, **options)
    assert isinstance(result, FetchError), result
    return result.reason


# Local files and stores


def test_names_stay_inside_the_image_root(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "..x.jpg").write_bytes(b"inside")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    assert read_picture(root, "a/..x.jpg") == read_picture(root, "./a//..x.jpg") == b"inside"
    reasons = {
        "../secret.jpg": "image name leads out of the image root",
        "a/../../secret.jpg": "image name leads out of the image root",
        str(tmp_path / "secret.jpg"): "image name leads out of the image root",
        f"file://{tmp_path}/secret.jpg": "image name leads out of the image root",
        f"file://{root}/../secret.jpg": "image name leads out of the image root",
        "file://elsewhere/secret.jpg": "image name leads out of the image root",
        "": "no image name",
        "a\0.jpg": "no image name",
        "a": "not a file",
        "none.jpg": "missing picture",
        "a/..x.jpg/none.jpg": "missing picture",
        "n" * 300 + ".jpg": "unreadable picture",
    }
    os.mkfifo(root / "pipe")
    reasons["pipe"] = "not a file"
    for name, reason in reasons.items():
        if not name.startswith("file:"):
            with pytest.raises(PictureError, match="^" + re.escape(reason)):
                read_picture(root, name)
    results = list(fetch_all(["a/..x.jpg", f"FILE://{root}/a/..x.jpg", *reasons], FetchOptions(str(root))))
    assert results[:2] == [b"inside", b"inside"]
    assert [result.reason for result in results[2:]] == list(reasons.values())
    assert [result.reason for result in fetch_all(["a"], FetchOptions())] == ["no image root"]


def test_object_stores_are_read_through_their_drivers():
    store = fsspec.filesystem("memory")
    store.pipe({"/fetch/a.jpg": b"a", "/fetch/large.jpg": bytes(101), "/fetch/full.jpg": bytes(100)})
    names = ["memory://fetch/" + name for name in ("large.jpg", "a.jpg", "none.jpg", "full.jpg")]
    try:
        results = list(
            fetch_all([*names, "ftp://host/a.jpg", "memory://a::file:///etc/x"], FetchOptions(max_bytes=100))
        )
    finally:
        store.rm("/fetch", recursive=True)
    assert results[1::2][:2] == [b"a", bytes(100)]
    reasons = [result.reason for result in results if isinstance(result, FetchError)]
    assert reasons == ["file too large", "missing picture", "scheme refused", "scheme refused"]


def test_a_missing_driver_is_named():
    with pytest.raises(UserError, match="oci://bucket/a.jpg: to read oci:// install ocifs"):
        list(fetch_all(["oci://bucket/a.jpg"], FetchOptions()))
    with pytest.raises(UserError, match="install a driver of fsspec for nonsense://"):
        list(fetch_all(["nonsense://a"], FetchOptions(schemes=("nonsense",))))


def test_a_store_that_fails_can_heal(monkeypatch):
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", lambda *_, **__: 1 / 0)
    (result,) = fetch_all(["memory://a"], FetchOptions())
    assert result.reason == "storage failure" and result.reason in HEALABLE
    assert str(result) == "storage failure: ZeroDivisionError: division by zero"


def test_a_store_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", lambda *_, **__: time.sleep(0.5))
    (result,) = fetch_all(["memory://a"], FetchOptions(timeout_s=0.05, retries=1))
    assert str(result) == "time-out: not read within 0.1 s"


def test_local_names_start_no_threads_and_import_no_client(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    program = (
        "import sys, threading; from data_tools.fetch import *\n"
        f"assert list(fetch_all(['a.jpg'] * 3, FetchOptions({str(tmp_path)!r}))) == [b'a'] * 3\n"
        "assert threading.active_count() == 1 and not {'aiohttp', 'fsspec', 'yarl'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("option", [{"concurrency": 0}, {"timeout_s": float("nan")}, {"retries": -1}, {"max_bytes": 0}])
def test_options_without_sense_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option)).replace("_", "-")):
        FetchOptions(**option)
    with pytest.raises(UserError, match="--user-agent 'a.b': begin with a name"):
        FetchOptions(user_agent="a.b")


# Order, memory, endings


def test_mixed_names_come_in_their_order(server, tmp_path):
    (tmp_path / "local.jpg").write_bytes(b"local")

    async def late(writer):
        await asyncio.sleep(0.2)
        writer.write(reply(b"late"))

    server.answers |= {"/late": late, **{f"/{number}": reply(b"%d" % number) for number in range(40)}}
    names = [server.url("/late"), "local.jpg", *(server.url(f"/{number}") for number in range(40)), "none.jpg"]
    results = list(fetch_all(names, FetchOptions(str(tmp_path), concurrency=3, **OPTIONS)))
    assert results[:2] == [b"late", b"local"]
    assert results[2:-1] == [b"%d" % number for number in range(40)]
    assert results[-1].reason == "missing picture"
    assert pickle.loads(pickle.dumps(results[-1])).args == results[-1].args
    assert server.most <= 3


def test_one_host_is_not_overrun(server, name_server):
    async def slow(writer):
        await asyncio.sleep(0.03)
        writer.write(reply(b"x"))

    server.answers |= {f"/{number}": slow for number in range(20)}
    options = FetchOptions(per_host=2, concurrency=20, respect_opt_out=False, **OPTIONS)
    assert list(fetch_all([server.url(f"/{number}") for number in range(20)], options)) == [b"x"] * 20
    assert server.most == 2
    name_server |= {f"host{number}.test": ["127.0.0.1"] for number in range(4)}
    names = [server.url(f"/{number}", f"host{number % 4}.test") for number in range(20)]
    assert list(fetch_all(names, options)) == [b"x"] * 20
    assert 2 < server.most <= 8


@pytest.mark.parametrize("limit", [7 * 2**20, 100])
@pytest.mark.parametrize("declared", [True, False])
def test_memory_is_bounded_while_nobody_takes_the_pictures(server, monkeypatch, limit, declared):
    peaks = []
    hold = fetch._Room.hold

    def record(room, item, count):
        hold(room, item, count)
        peaks.append(room._used)

    monkeypatch.setattr(fetch._Room, "hold", record)
    bodies = [bytes([number]) * (2**21 + number) for number in range(12)]
    for number, body in enumerate(bodies):
        answer = reply(body)
        server.answers[f"/{number}"] = answer if declared else answer.replace(b"Content-Length", b"X-Length")
    names = [server.url(f"/{number}") for number in range(12)]
    options = FetchOptions(max_held_bytes=limit, respect_opt_out=False, timeout_s=10, **OPTIONS)
    with contextlib.closing(fetch_all(names, options)) as results:
        assert next(results) == bodies[0]
        time.sleep(0.3)
        assert list(results) == bodies[1:]
    assert max(peaks) <= limit + 2**21 + 12


def test_room_that_turns_out_to_be_free_is_passed_on():
    async def use() -> None:
        room = fetch._Room(10)
        first, second, third = (fetch._Item(name) for name in "abc")
        room.hold(first, 10)
        for waiting, count in ((second, 4), (third, 3)):
            with pytest.raises(fetch._NoRoom):
                room.hold(waiting, count)
        waits = [asyncio.ensure_future(room.wait(item)) for item in (second, third)]
        await asyncio.sleep(0)
        room.hold(first, 5)
        await asyncio.wait_for(waits[0], 5)
        assert not waits[1].done()  # 4 of the 5 that are free are spoken for
        room.want(third)
        await asyncio.wait_for(waits[1], 5)
        room.hold(third, 100)

    asyncio.run(use())


def test_closing_early_ends_everything(server, name_server, monkeypatch, caplog):
    async def never(writer):
        await asyncio.sleep(60)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(0.3) or real(*arguments))
    name_server["slow.test"] = ["127.0.0.1"]
    server.answers |= {"/a": reply(b"a"), "/never": never}
    names = [server.url("/a"), *[server.url("/never")] * 30, server.url("/", "slow.test")]
    results = fetch_all(names, FetchOptions(**{**OPTIONS, "respect_opt_out": False}))
    assert next(results) == b"a"
    running = [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]
    assert sorted(running) == ["fetch", "fetch-resolve"]
    started_s = time.monotonic()
    results.close()
    assert time.monotonic() - started_s < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
    gc.collect()  # tasks that were left behind would complain now
    assert not caplog.records


@pytest.mark.parametrize("ending", ["interrupt", "kept open"])
def test_a_process_that_waits_for_a_server_can_end(server, ending):
    async def never(writer):
        await asyncio.sleep(60)

    server.answers |= {"/a": reply(b"a"), "/never": never}
    program = (
        "import sys, threading; from data_tools.fetch import *\n"
        f"results = fetch_all(sys.argv[1:], FetchOptions(allow_private=True, respect_opt_out=False))\n"
        "next(results); print('begun', flush=True)\n"
        "try:\n"
        f"    {'next(results)' if ending == 'interrupt' else 'pass'}\n"
        "except KeyboardInterrupt:\n"
        "    print('threads', threading.active_count())\n"
    )
    command = [sys.executable, "-c", program, server.url("/a"), server.url("/never")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        if ending == "interrupt":
            deadline_s = time.monotonic() + 10
            while not server.count("/never") and time.monotonic() < deadline_s:
                time.sleep(0.01)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=15)
    finally:
        process.kill()
    assert output == ("threads 1\n" if ending == "interrupt" else "", "")
    assert process.returncode == 0


def test_mistakes_in_the_thread_are_raised_and_not_counted(server, monkeypatch):
    server.answers["/a"] = reply(b"a")
    monkeypatch.setattr(fetch._Downloader, "_read_body", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get(server, "/a")


# Hostile servers


def test_a_server_that_stalls_or_drips_is_given_up(server):
    async def stall(writer):
        await asyncio.sleep(60)

    async def stall_in_body(writer):
        writer.write(reply(b"half", length=8))
        await asyncio.sleep(60)

    async def drip(writer):
        writer.write(reply(length=1000))
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def drip_headers(writer):
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(10_000):
            writer.write(b"A: %d\r\n" % number)
            await writer.drain()
            await asyncio.sleep(0.05)

    server.answers |= {"/stall": stall, "/half": stall_in_body, "/drip": drip, "/headers": drip_headers}
    quick = {"respect_opt_out": False, "retries": 0}
    started_s = time.monotonic()
    assert refusal(server, "/stall", read_timeout_s=0.2, **quick) == "time-out"
    assert refusal(server, "/half", read_timeout_s=0.2, **quick) == "time-out"
    assert refusal(server, "/headers", timeout_s=0.4, **quick) == "time-out"
    assert refusal(server, "/drip", slow_after_s=0.2, **quick) == "too slow"
    assert refusal(server, "/drip", timeout_s=0.3, min_bytes_per_s=0, **quick) == "time-out"
    assert time.monotonic() - started_s < 5
    assert {"time-out", "too slow"} <= HEALABLE


def test_a_connection_that_is_not_made_is_given_up():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        (closed,) = fetch_all([f"http://127.0.0.1:{port}/"], FetchOptions(**OPTIONS))
        listener.listen(0)
        with contextlib.ExitStack() as stack:  # fill the queue, so that the next one is not even answered
            for _ in range(3):
                connection = stack.enter_context(socket.socket())
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    connection.connect(("127.0.0.1", port))
            options = FetchOptions(**{**OPTIONS, "retries": 0}, connect_timeout_s=0.2)
            (silent,) = fetch_all([f"http://127.0.0.1:{port}/"], options)
    assert str(closed) == "connection failed: Connection refused"
    assert str(silent) == "connection failed: no connection within 0.2 s"


def test_lies_about_the_length_are_found(server):
    server.answers |= {
        "/long": reply(b"abc", length=9),
        "/short": reply(b"abcdef", length=3),
        "/negative": reply(b"abc", length=-3),
        "/words": reply(b"abc", length="three"),
        "/none": b"HTTP/1.1 200 OK\r\n\r\nabc",
        "/two": reply(b"abc", Transfer_Encoding="chunked"),
        "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n9\r\nx",
        "/size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        "/claims": reply(b"abc", length=10**15),
        "/empty": reply(b""),
    }
    short = get(server, "/short")  # what follows is noticed if it is there already
    assert short == b"abc" or short.reason == "unexpected answer"
    assert get(server, "/none") == b"abc"
    assert get(server, "/empty") == b""
    assert refusal(server, "/size") in ("answer cut off", "unexpected answer")  # as it comes with the head or behind it
    for path in ("/short", "/none", "/empty", "/size"):
        del server.answers[path]
    reasons = {path: refusal(server, path) for path in server.answers}
    assert reasons == {
        "/long": "answer cut off",
        "/negative": "unexpected answer",
        "/words": "unexpected answer",
        "/two": "unexpected answer",
        "/chunks": "answer cut off",
        "/claims": "file too large",
    }


def test_bodies_end_at_the_size_limit(server):
    sent = 0

    async def pour(writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(2**16))
            sent += 2**16
            await writer.drain()

    server.answers |= {"/pour": pour, "/full": reply(bytes(1000)), "/over": reply(bytes(1001))}
    assert refusal(server, "/pour", max_bytes=2**20) == "file too large"
    assert sent < 2**25 and server.count("/pour") == 1
    assert get(server, "/full", max_bytes=1000) == bytes(1000)
    assert refusal(server, "/over", max_bytes=1000) == "file too large"


def test_compression_is_undone_within_the_limit(server):
    text = b"picture " * 100
    raw = zlib.compressobj(wbits=-15)
    server.answers |= {
        "/gzip": reply(gzip.compress(text), Content_Encoding="gzip"),
        "/zlib": reply(zlib.compress(text), Content_Encoding="deflate"),
        "/raw": reply(raw.compress(text) + raw.flush(), Content_Encoding="Deflate"),
        "/bomb": reply(gzip.compress(bytes(2**26)), Content_Encoding="gzip"),
        "/cut": reply(gzip.compress(text)[:-9], Content_Encoding="gzip"),
        "/not": reply(text, Content_Encoding="gzip"),
        "/br": reply(text, Content_Encoding="br"),
        "/twice": reply(gzip.compress(gzip.compress(text)), Content_Encoding="gzip, gzip"),
    }
    assert get(server, "/gzip") == get(server, "/zlib") == get(server, "/raw") == text
    assert get(server, "/gzip", max_bytes=800) == text
    assert refusal(server, "/gzip", max_bytes=799) == "file too large"
    assert refusal(server, "/bomb", max_bytes=2**20) == "file too large"
    assert refusal(server, "/cut") == "answer cut off"
    assert {refusal(server, path) for path in ("/not", "/br", "/twice")} == {"unexpected answer"}
    assert len(fetch._Inflater(100).inflate(gzip.compress(bytes(2**20)))) == 101
    assert "Accept-Encoding: identity" in server.heads[-1]


def test_bytes_that_are_no_http_are_a_failure(server):
    good = reply(b"abc", Content_Type="image/jpeg")
    answers = [
        b"",
        b"\0",
        b"\x16\x03\x01",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
    ]
    answers += [b"HTTP/1.1 999999 Many\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000 + b"\r\n"]
    answers += [b"HTTP/1.1 200 OK\r\nA: " + b"b" * 2**20 + b"\r\n\r\n", b"HTTP/1.1 206 Partial\r\n\r\nabc"]
    answers += [good[:place] + bytes([byte]) + good[place + 1 :] for place in range(30) for byte in (0, 10, 200)]
    server.answers |= {f"/{number}": answer for number, answer in enumerate(answers)}
    options = FetchOptions(**{**OPTIONS, "retries": 0}, respect_opt_out=False, read_timeout_s=1, timeout_s=2)
    results = list(fetch_all([server.url(f"/{number}") for number in range(len(answers))], options))
    assert all(isinstance(result, (bytes, FetchError)) for result in results)
    assert all(isinstance(result, FetchError) for result in results[:10])
    assert {str(result).isascii() for result in results if isinstance(result, FetchError)} == {True}


def test_redirects_are_followed_checked_and_counted(server):
    def to(place: str, status: str = "302 Found") -> bytes:
        return reply(status=status, Location=place)

    server.answers |= {
        "/a": to("b/c", "301 Moved"),
        "/b/c": to(server.url("/d"), "307 Temporary"),
        "/d": to("/e?x=1#part", "308 Permanent"),
        "/e?x=1": reply(b"there"),
        "/for-ever": to("/for-ever"),
        "/file": to("file:///etc/passwd"),
        "/data": to("data:image/png;base64,AAAA"),
        "/ftp": to("ftp://127.0.0.1/x"),
        "/memory": to("memory://fetch/a.jpg"),
        "/port": to("http://127.0.0.1:25/"),
        "/nowhere": to(""),
        "/bad": to("http://[::1"),
    }
    assert get(server, "/a") == b"there"
    assert get(server, "/a", max_redirects=3) == b"there"
    assert refusal(server, "/a", max_redirects=2) == "too many redirects"
    assert refusal(server, "/for-ever") == "too many redirects"
    assert server.count("/for-ever") == 6
    assert {refusal(server, path) for path in ("/file", "/data", "/ftp", "/memory")} == {"scheme refused"}
    assert {refusal(server, path) for path in ("/port", "/bad")} == {"bad URL"}
    assert refusal(server, "/nowhere") == "unexpected answer"


def test_addresses_are_judged_where_the_connection_is_made(server, name_server, monkeypatch):
    server.answers |= {"/x": reply(b"secret"), "/to": reply(status="302 Found", Location=server.url("/x"))}
    name_server |= {
        "inner.test": ["127.0.0.1"],
        "mapped.test": ["::ffff:127.0.0.1"],
        "rebinds.test": ["93.184.215.14", "127.0.0.1"],
    }
    public = FetchOptions(backoff_s=0.01, retries=0, connect_timeout_s=0.3, timeout_s=1)
    hosts = ["127.0.0.1", "inner.test", "mapped.test", "[::1]", "[::ffff:7f00:1]", "0.0.0.0", "localhost"]
    results = list(fetch_all([server.url("/x", host) for host in hosts], public))
    assert [result.reason for result in results] == ["address refused"] * len(hosts)
    odd = [server.url("/x", host) for host in ("2130706433", "127.1", "0x7f.1", "0177.0.0.1", "127.0.0.1.")]
    assert {result.reason for result in fetch_all(odd, public)} <= {"bad URL", "address refused", "unknown host"}

    # The address that was judged is the one that is connected to: another answer of the name server changes nothing.
    list(fetch_all([server.url("/x", "rebinds.test")] * 3, public))
    assert name_server["asked"].count("rebinds.test") == 1

    # And where a private address comes through all the same, no socket is made for it.
    async def lie(self, host, port=0, family=0):
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 6, "flags": 0}]

    monkeypatch.setattr(fetch._Resolver, "resolve", lie)
    (result,) = fetch_all([server.url("/x", "public.test")], public)
    assert result.reason == "address refused"
    assert server.requests == []


def test_of_a_names_addresses_only_the_public_ones_are_tried(server, monkeypatch):
    def look_up(host, *arguments):
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, 0)) for address in ("127.0.0.2", "127.0.0.1", "127.0.0.3")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    server.answers["/x"] = reply(b"x")
    options = FetchOptions(**{**OPTIONS, "allow_private": False})
    assert list(fetch_all([server.url("/x", "both.test")], options)) == [b"x"]


def test_a_redirect_to_a_private_address_is_refused(server, name_server, monkeypatch):
    """The first address passes for a public one here; those that it sends to do not."""
    name_server["inner.test"] = ["127.0.0.3"]
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    for host in ("127.0.0.2", "inner.test", "localhost", "[::1]"):
        name_server.setdefault("localhost", ["127.0.0.4"])
        server.answers["/to"] = reply(status="302 Found", Location=server.url("/x", host))
        assert refusal(server, "/to", allow_private=False) == "address refused"
    assert server.count("/to") == 4 and server.count("/x") == 0


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.0.1 169.254.169.254 172.16.0.1 192.0.0.1 192.0.2.1 192.168.1.1 "
    "198.18.0.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16 100.100.100.200 :: ::1 "
    "::127.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::a00:1 64:ff9b:1::1.1.1.1 2002:7f00:1::1 "
    "2002:a9fe:a9fe::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 "
    "fec0::1 ff02::1 ::ffff:0:127.0.0.1 127.1 localhost 1.1.1.1.1".split(),
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://h:99999/",
        "http://h:x/",
        "http://[::1/",
        "http://a\nb/",
        "http://h/a\0b",
        "http://h:0/",
    ]
    + ["http://a..b/", "http://h:22/x", "https://h:6379:1/", "http://" + "a" * 70 + ".com/", "http://user:pass@/x"],
)
def test_urls_that_are_none_are_refused(url):
    (result,) = fetch_all([url], FetchOptions(**OPTIONS))
    assert result.reason in ("bad URL", "unknown host")
    assert "pass" not in str(result)


def test_urls_are_sent_as_they_are_spelled(server):
    for path in ("/a%2fb?k=%2B+%7e&s=a/b,c", "/a/../b", "/%"):
        get(server, path, respect_opt_out=False)
    get(server, "/ü b", respect_opt_out=False)
    assert server.requests == ["/a%2fb?k=%2B+%7e&s=a/b,c", "/a/../b", "/%25", "/%C3%BC%20b"]


def test_credentials_go_to_their_host_only_and_proxies_are_not_asked(server, name_server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url("/proxy"))
    name_server["other.test"] = ["127.0.0.1"]
    server.answers |= {"/a": reply(status="302 Found", Location=server.url("/b", "other.test")), "/b": reply(b"b")}
    options = FetchOptions(**OPTIONS, respect_opt_out=False)
    assert list(fetch_all([server.url("/a", "user:secret@127.0.0.1")], options)) == [b"b"]
    assert ["Authorization: Basic" in head for head in server.heads] == [True, False]
    assert server.requests == ["/a", "/b"]


def test_the_proxy_of_the_environment_is_asked_when_that_is_wanted(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.setenv("no_proxy", "")
    server.answers["http://public.test/x"] = reply(b"through")
    options = FetchOptions(trust_env=True, respect_opt_out=False)
    assert list(fetch_all(["http://public.test/x", "http://10.0.0.1/"], options))[0] == b"through"
    assert server.requests == ["http://public.test/x"]


def test_plain_http_behind_https_is_a_tls_failure():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(reply(b"abc"))
                connection.recv(2**16)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        (result,) = fetch_all([url], FetchOptions(**OPTIONS))
        thread.join(10)
    assert result.reason == "TLS failure"


# Another try


def test_failures_that_can_heal_are_tried_again(server):
    async def reset_in_body(writer):
        writer.write(reply(b"abc", length=100))
        await writer.drain()
        writer.transport.abort()

    good = reply(b"good")
    server.answers |= {
        "/500": [reply(status="500 Oops"), good],
        "/503": [reply(status="503 Busy"), reply(status="502 Bad"), good],
        "/reset": [reset_in_body, good],
        "/drop": [b"", good],
        "/404": [NOT_FOUND, good],
        "/410": [reply(status="410 Gone"), good],
        "/403": [reply(status="403 No"), good],
        "/418": [reply(status="418 Teapot"), good],
        "/always": reply(status="599 Odd"),
    }
    paths = ["/500", "/503", "/reset", "/drop"]
    assert [get(server, path, retries=2, respect_opt_out=False) for path in paths] == [b"good"] * 4
    assert [server.count(path) for path in paths] == [2, 3, 2, 2]
    reasons = [refusal(server, path, retries=2) for path in ("/404", "/410", "/403", "/418", "/always")]
    assert reasons == ["missing picture", "missing picture", "access denied", "unexpected answer", "server error"]
    assert [server.count(path) for path in ("/404", "/410", "/403", "/418", "/always")] == [1, 1, 1, 1, 3]
    assert {reason in HEALABLE for reason in reasons[:4]} == {False} and reasons[4] in HEALABLE


def test_retry_after_is_waited_for(server):
    server.answers |= {
        "/a": [reply(status="429 Slow down", Retry_After="1"), reply(b"good")],
        "/b": reply(b"other"),
        "/long": reply(status="429 Slow down", Retry_After="3600"),
    }
    options = FetchOptions(**OPTIONS, respect_opt_out=False, concurrency=1)
    started_s = time.monotonic()
    assert list(fetch_all([server.url("/a"), server.url("/b")], options)) == [b"good", b"other"]
    assert 1.0 <= time.monotonic() - started_s < 4
    # Longer than we wait: the host is left alone, and the others on it are told so at once.
    started_s = time.monotonic()
    results = list(fetch_all([server.url("/long"), *[server.url("/b")] * 30], options))
    assert {result.reason for result in results} == {"too many requests"} <= HEALABLE
    assert (server.count("/long"), server.count("/b")) == (1, 1) and time.monotonic() - started_s < 3


def test_retry_after_may_be_a_date():
    from multidict import CIMultiDict

    now = email.utils.formatdate(10**9, usegmt=True)
    later = email.utils.formatdate(10**9 + 7, usegmt=True)
    parse = fetch._parse_retry_after
    assert parse(CIMultiDict({"Date": now, "retry-after": later})) == 7
    assert parse(CIMultiDict({"Date": later, "Retry-After": now})) == 0
    assert parse(CIMultiDict({"Retry-After": later})) == 0  # long past
    assert [parse(CIMultiDict({"Retry-After": value})) for value in ("12", " 0 ", "-1", "1.5", "soon", "")] == [12] + [
        0
    ] * 5


def test_waits_derive_from_the_name_and_grow():
    waits = [fetch._compute_backoff_s("http://a/x.jpg", attempt, 0.5) for attempt in range(9)]
    assert waits == [fetch._compute_backoff_s("http://a/x.jpg", attempt, 0.5) for attempt in range(9)]
    assert all(0.5 * 2**attempt * 0.5 <= wait < 0.5 * 2**attempt * 1.5 for attempt, wait in enumerate(waits[:5]))
    assert max(waits) < 30
    assert len({fetch._compute_backoff_s(f"http://a/{number}", 0, 0.5) for number in range(100)}) == 100


def test_busy_name_servers_are_asked_again_and_each_name_once(server, name_server):
    again = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    name_server |= {
        "busy.test": [again, again, "127.0.0.1"],
        "dead.test": [again],
        "none.test": [socket.gaierror(socket.EAI_NONAME, "Name or service not known")],
    }
    server.answers["/x"] = reply(b"x")
    options = FetchOptions(**OPTIONS)
    names = [server.url("/x", host) for host in ("busy.test", "dead.test", "none.test") for _ in range(20)]
    results = list(fetch_all(names, options))
    assert results[:20] == [b"x"] * 20
    assert {str(result) for result in results[20:40]} == {
        "name resolution failed: dead.test: Temporary failure in name resolution"
    }
    assert {str(result) for result in results[40:]} == {"unknown host: none.test"}
    assert Counter(name_server["asked"]) == {"busy.test": 3, "dead.test": 3, "none.test": 1}


def test_a_slow_name_server_answers_the_next_try(server, name_server, monkeypatch):
    real = socket.getaddrinfo

    def slow(host, *arguments):
        if host == "slow.test":
            time.sleep(0.4)
        return real(host, *arguments)

    name_server["slow.test"] = ["127.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    server.answers["/x"] = reply(b"x")
    options = FetchOptions(allow_private=True, connect_timeout_s=0.25, retries=3, backoff_s=0.1)
    assert list(fetch_all([server.url("/x", "slow.test")], options)) == [b"x"]
    assert name_server["asked"] == ["slow.test"]


# Opting out


def test_opt_out_headers_are_respected(server):
    server.answers |= {
        "/noai": reply(b"x", X_Robots_Tag="noai"),
        "/tdm": reply(b"x", TDM_Reservation="1"),
        "/ours": reply(b"x", X_Robots_Tag="image-text-pretrain: noindex"),
        "/other": reply(b"x", X_Robots_Tag="otherbot: noindex"),
        "/way": reply(status="302 Found", Location="/other", X_Robots_Tag="noimageai"),
    }
    assert [refusal(server, path) for path in ("/noai", "/tdm", "/ours", "/way")] == ["opted out"] * 4
    assert "opted out" not in HEALABLE
    assert get(server, "/other") == b"x"
    assert get(server, "/noai", respect_opt_out=False) == b"x"
    assert refusal(server, "/ours") == "opted out"
    assert get(server, "/ours", user_agent="somebody/1 (+http://x)") == b"x"
    assert "User-Agent: somebody/1 (+http://x)" in server.heads[-1]


def test_robots_are_asked_for_once_and_followed(server, name_server):
    robots = b"User-agent: *\nDisallow: /private\n"
    server.answers |= {f"/{number}": reply(b"x") for number in range(30)}
    server.answers |= {"/private/1": reply(b"x"), "/robots.txt": reply(robots)}
    server.answers["/way"] = reply(status="302 Found", Location="/private/1")
    names = [server.url(f"/{number}") for number in range(30)] + [server.url(path) for path in ("/private/1", "/way")]
    names.append(server.url("/0/../private/1"))
    results = list(fetch_all(names, FetchOptions(**OPTIONS)))
    assert results[:30] == [b"x"] * 30
    assert [str(result) for result in results[30:]] == ["opted out: robots.txt"] * 3
    assert server.count("/robots.txt") == 1 and server.count("/private/1") == 0
    assert get(server, "/private/1", respect_opt_out=False) == b"x"
    name_server["other.test"] = ["127.0.0.1"]
    list(fetch_all([names[0], server.url("/0", "other.test")], FetchOptions(**OPTIONS)))
    assert server.count("/robots.txt") == 3


def test_robots_that_cannot_be_had(server):
    async def stall(writer):
        await asyncio.sleep(60)

    server.answers["/x"] = reply(b"x")
    large = b"User-agent: *\nDisallow: /x\n" + b"#" * 2**20
    private = reply(status="302 Found", Location="file:///etc/passwd")
    for answer, expected in [
        (reply(status="403 No"), b"x"),
        (reply(status="302 Found", Location="/robots.txt"), b"x"),
        (private, b"x"),
        (reply(b"User-agent: *\nDisallow: /", length=99), b"x"),
        (stall, b"x"),
        (reply(status="503 Busy"), "robots.txt unavailable"),
        (reply(status="429 Slow down", Retry_After="3600"), "robots.txt unavailable"),
        ([reply(status="500 Oops"), NOT_FOUND], b"x"),
        (reply(large), "opted out"),
        (b"", "connection failed"),
    ]:
        server.answers["/robots.txt"] = answer
        before = server.count("/x")
        result = get(server, "/x", read_timeout_s=0.3)
        assert (result.reason if isinstance(result, FetchError) else result) == expected, answer
        assert server.count("/x") - before == (expected == b"x")
