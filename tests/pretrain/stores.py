"""What the tests of reading share: small shards, and an HTTP server on loopback that misbehaves as it is told to."""

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_tools.shards import Manifest, write_shard


def write_shards(folder: Path, shards: int = 3, samples: int = 4, size: int = 3000) -> Manifest:
    """A dataset whose samples have a "jpg" of about `size` bytes (random ones) and a caption that tells their place."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number in range(shards):
        with write_shard(folder, f"{number:05d}.tar") as writer:
            for place in range(samples):
                noise = hashlib.shake_128(f"{number} {place}".encode()).digest(size + 17 * place)
                writer.add(f"{number}_{place}", {"jpg": noise, "txt": f"picture {number} {place}".encode()})
        infos.append(writer.info)
    Manifest.of_shards(folder, infos, captions=shards * samples).write()
    return Manifest.load(folder)


class HttpStore:
    """Serves a folder with ranges. `faults` are taken by the requests for tars, one each; an endless one is `always`.

    stall: nothing comes. drip: the head, then a byte a while. drop: half of the body, then the end. A number: that status.
    """

    def __init__(self, folder: Path, ranges: bool = True, listing: bool = True) -> None:
        self.folder, self.ranges, self.listing = folder, ranges, listing
        self.faults: deque = deque()
        self.always: object = None
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                store._answer(self)

            do_HEAD = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # of a client that has gone, as it should from a server that stalls

        self._open: list[socket.socket] = []
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go away, with all connections."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fetched(self, suffix: str = ".tar") -> list[str]:
        """Names of the files whose content was asked for, once a request."""
        return [path.lstrip("/") for path, method in self.requests if method == "GET" and path.endswith(suffix)]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self._open.append(request.connection)
        self.requests.append((request.path, request.command))
        fault = self.always
        if fault is None and request.path.endswith(".tar") and self.faults:
            fault = self.faults.popleft()
        path = self.folder / request.path.lstrip("/")
        if path.is_dir() and self.listing:
            body = "".join(f'<a href="{name.name}">{name.name}</a>' for name in path.iterdir()).encode()
            return self._send(request, 200, body, {"Content-Type": "text/html"})
        status, body, headers = 200, path.read_bytes() if path.is_file() else b"", {}
        if not path.is_file():
            status = 404
        elif self.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))):
            start, end = int(asked[1]), int(asked[2] or len(body) - 1) + 1
            if start >= len(body):
                status, body = 416, b""
            else:
                headers["Content-Range"] = f"bytes {start}-{min(end, len(body)) - 1}/{len(body)}"
                status, body = 206, body[start:end]
        if isinstance(fault, int):
            return self._send(request, fault, b"", {})
        if fault == "stall":
            self.released.wait(30)
            request.close_connection = True
        elif fault in ("drip", "drop"):
            request.send_response(status)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            count = len(body) // 2 if fault == "drop" else 1
            request.wfile.write(body[:count])
            while fault == "drip" and count < len(body) and not self.released.wait(0.05):
                request.wfile.write(body[count : count + 1])
                count += 1
            request.close_connection = True
        else:
            self._send(request, status, body, headers)

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@contextlib.contextmanager
def serve(folder: Path, **options: bool) -> Iterator[HttpStore]:
    store = HttpStore(folder, **options)
    try:
        yield store
    finally:
        store.stop()


def wait_for(condition, timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.01)
