"""Beats between the supervisors of a job: who lives, what each says of itself, and what a silent one may be.

A beat is one UDP datagram: an HMAC-SHA256 of what follows, and compressed JSON. It carries the whole of what a supervisor has
to say, so one that is lost costs half a second and nothing has to be sent again. Beats are sent at each change, too. All of it
runs in a thread of its own: a supervisor that waits for its disk still beats.

A node that falls silent is asked by opening a TCP connection to the same port. The kernel of a node whose processes are
frozen still accepts it; where only the supervisor has died it refuses; a node that is cut off or without power does not
answer.
"""

import errno
import hashlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECRET = "secret"
DIGEST_BYTES = 32
MOST_BYTES = 60_000  # of a datagram; UDP's own limit is 65,507
LATE_S = 0.25  # a loop that comes round later than this was itself held up, and blames nobody for that time
ACCEPTS, REFUSES, NO_ANSWER = "accepts", "refuses", "no answer"


def load_secret(folder: Path) -> bytes:
    """The key of a run's beats, made by whoever comes first."""
    path = folder / SECRET
    draft = folder / f"{SECRET}.{secrets.token_hex(4)}.tmp"
    if not path.exists():
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
        try:
            os.link(draft, path)  # fails where another supervisor was faster: a rename would give two keys
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes().strip()


class Peer:
    """What is known of another supervisor."""

    def __init__(self, place: tuple[str, int], now_s: float) -> None:
        self.place = place
        self.heard_s = now_s  # when its last beat came; moved on for time in which we could not have heard it
        self.heard = False  # ever
        self.stamp: tuple[int, int] = (0, 0)  # life of its process and number of the beat: an older one changes nothing
        self.says: dict[str, Any] = {}
        self.probe: socket.socket | None = None
        self.probed_s = 0.0
        self.answer: str | None = None


class Heart:
    """The thread that beats and listens. `wake()` is called from it when something new was heard."""

    def __init__(self, node: str, job: str, secret: bytes, beat_s: float, wake: Callable[[], None]) -> None:
        self.node, self.job, self.secret, self.beat_s, self.wake = node, job, secret, beat_s, wake
        self.started = time.time_ns()
        self.count = 0
        self.lock = threading.Lock()
        self.peers: dict[str, Peer] = {}
        self.targets: tuple[str, ...] = ()
        self.says: dict[str, Any] = {}
        self.late_s = 0.0  # by how much this loop came late, in all
        self.closed = False
        self.datagrams, self.listener = open_sockets()
        self.port: int = self.listener.getsockname()[1]
        self.poke_in, self.poke_out = socket.socketpair()
        for one in (self.datagrams, self.listener, self.poke_in, self.poke_out):
            one.setblocking(False)
        self.selector = selectors.DefaultSelector()
        for one in (self.datagrams, self.listener, self.poke_out):
            self.selector.register(one, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.beat_and_listen, name="heart", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Send what was said last once more, and end."""
        self.closed = True
        self.poke()
        self.thread.join(timeout=2)

    def poke(self) -> None:
        try:
            self.poke_in.send(b".")
        except OSError:
            pass  # it is awake, or has ended

    def meet(self, places: dict[str, tuple[str, int]]) -> None:
        """Where the others are, by node; those that were known stay as they are unless they have moved."""
        with self.lock:
            for node, place in places.items():
                if node != self.node and (node not in self.peers or self.peers[node].place != place):
                    self.peers[node] = Peer(place, time.monotonic())

    def say(self, says: dict[str, Any], targets: tuple[str, ...]) -> None:
        """From now on beat with `says` to `targets`; at once, if that is something new."""
        with self.lock:
            changed = says != self.says or targets != self.targets
            self.says, self.targets = says, targets
        if changed:
            self.poke()

    def heard(self) -> dict[str, dict[str, Any]]:
        """What each node that was ever heard said last."""
        with self.lock:
            return {node: peer.says for node, peer in self.peers.items() if peer.heard}

    def last_said(self, node: str) -> dict[str, Any]:
        """What a node said last; nothing of one that was never heard."""
        peer = self.peers.get(node)
        return peer.says if peer else {}

    def silence_s(self, node: str) -> float:
        """Since when nothing was heard of a node, without the time in which this process could not have heard it."""
        if node == self.node:
            return 0.0
        with self.lock:
            peer = self.peers.get(node)
            return float("inf") if peer is None else time.monotonic() - peer.heard_s

    def answer(self, node: str) -> str | None:
        """How a silent node answered when it was last asked: ACCEPTS, REFUSES, NO_ANSWER, or None before it was."""
        with self.lock:
            peer = self.peers.get(node)
            return None if peer is None else peer.answer or (NO_ANSWER if peer.probe else None)

    def beat_and_listen(self) -> None:
        due_s = time.monotonic()
        while not self.closed:
            ready = self.selector.select(timeout=max(0.0, due_s - time.monotonic()))
            now_s = time.monotonic()
            if now_s - due_s > LATE_S:
                self.excuse(now_s - due_s)
            told = False
            for key, _ in ready:
                if key.fileobj is self.datagrams:
                    told |= self.receive()
                elif key.fileobj is self.listener:
                    self.greet()
                elif key.fileobj is self.poke_out:
                    self.poke_out.recv(4096)
                    due_s = now_s
                else:
                    self.end_probe(key.data)
            if now_s >= due_s:
                self.beat()
                self.ask_the_silent()
                due_s = now_s + self.beat_s
            if told:
                self.wake()
        self.beat()
        for one in (self.datagrams, self.listener, self.poke_in, self.poke_out):
            one.close()

    def excuse(self, late_s: float) -> None:
        """This process was held up: in that time beats may have come that it has not read yet, or never will."""
        with self.lock:
            self.late_s += late_s
            now_s = time.monotonic()
            for peer in self.peers.values():
                peer.heard_s = min(now_s, peer.heard_s + late_s)

    def beat(self) -> None:
        with self.lock:
            self.count += 1
            says = {"node": self.node, "job": self.job, "stamp": [self.started, self.count], **self.says}
            places = [self.peers[node].place for node in self.targets if node in self.peers]
        data = seal(says, self.secret)
        for place in places:
            try:
                self.datagrams.sendto(data, place)
            except OSError:
                pass  # no way there now: the cable is out, or the buffer full. The next beat is due soon

    def receive(self) -> bool:
        """Read all that has come; whether anything in it is new."""
        new = False
        while True:
            try:
                data, _ = self.datagrams.recvfrom(65536)
            except BlockingIOError:
                return new
            except OSError:
                continue  # what an earlier datagram met is reported here; the socket is none the worse
            says = unseal(data, self.secret)
            if says is None or says.get("job") != self.job:
                continue
            with self.lock:
                peer = self.peers.get(says["node"])
                stamp = tuple(says["stamp"])
                if peer is None or stamp <= peer.stamp:
                    continue
                new |= strip(says) != strip(peer.says)
                peer.says, peer.stamp, peer.heard, peer.heard_s = says, stamp, True, time.monotonic()
                peer.answer = None

    def greet(self) -> None:
        """Somebody asks whether this process lives: a connection that is accepted and closed says so."""
        try:
            while True:
                self.listener.accept()[0].close()
        except OSError:
            pass

    def ask_the_silent(self) -> None:
        now_s = time.monotonic()
        with self.lock:
            peers = list(self.peers.values())
        for peer in peers:
            if not peer.heard or now_s - peer.heard_s < 1.5 * self.beat_s:
                continue
            if peer.probe is None and now_s - peer.probed_s >= 2 * self.beat_s:
                peer.probed_s = now_s
                self.begin_probe(peer)

    def begin_probe(self, peer: Peer) -> None:
        probe = socket.socket(socket.AF_INET6 if ":" in peer.place[0] else socket.AF_INET)
        probe.setblocking(False)
        code = probe.connect_ex(peer.place)
        peer.probe = probe
        if code == errno.EINPROGRESS:
            self.selector.register(probe, selectors.EVENT_WRITE, peer)
        else:
            self.note_answer(peer, code)

    def end_probe(self, peer: Peer) -> None:
        self.selector.unregister(peer.probe)
        self.note_answer(peer, peer.probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def note_answer(self, peer: Peer, code: int) -> None:
        peer.probe.close()
        answer = {0: ACCEPTS, errno.ECONNREFUSED: REFUSES}.get(code, NO_ANSWER)
        with self.lock:
            peer.probe, peer.answer = None, answer
        self.wake()


def open_sockets() -> tuple[socket.socket, socket.socket]:
    """A UDP and a listening TCP socket with the same port, which the kernel chooses."""
    family, every = (socket.AF_INET6, "::") if not socket_family(socket.AF_INET) else (socket.AF_INET, "")
    for _ in range(100):
        listener = socket.socket(family)
        listener.bind((every, 0))
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        try:
            datagrams.bind((every, listener.getsockname()[1]))
        except OSError:  # the port is another program's in UDP
            listener.close()
            datagrams.close()
            continue
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
        listener.listen(1024)
        return datagrams, listener
    raise OSError(errno.EADDRINUSE, "no port is free in both TCP and UDP")


def socket_family(family: int) -> bool:
    try:
        socket.socket(family).close()
    except OSError:
        return False
    return True


def strip(says: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in says.items() if name != "stamp"}


def seal(says: dict[str, Any], secret: bytes) -> bytes:
    """Raises ValueError for more than a datagram holds."""
    data = zlib.compress(json.dumps(says, separators=(",", ":")).encode(), 1)
    if len(data) + DIGEST_BYTES > MOST_BYTES:
        raise ValueError(f"a beat of {len(data)} bytes; a datagram holds {MOST_BYTES}")
    return hmac.digest(secret, data, hashlib.sha256) + data


def unseal(data: bytes, secret: bytes) -> dict[str, Any] | None:
    """What a datagram says; None for one that was not sealed with this secret."""
    digest, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if not hmac.compare_digest(digest, hmac.digest(secret, data, hashlib.sha256)):
        return None
    return json.loads(zlib.decompress(data))
