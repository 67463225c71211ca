"""The bytes of pictures by name: local paths, http(s) downloads and object stores, in order and in bounded memory.

Names come from tables that anybody may have written, and servers answer what they like. So: only the schemes asked
for; addresses are judged where the socket is made, after name resolution and for every redirect; every wait, size and
number has a limit; and every failure is a FetchError with one of a few reasons, to be counted by.

Politeness. A host is asked for at most `per_host` pictures at a time, and not before a `Retry-After` has passed. With
`respect_opt_out`, robots.txt is read once a host and followed, and answers whose X-Robots-Tag says noai, noimageai,
noindex, noimageindex or none, or with `tdm-reservation: 1`, are not kept. No robots.txt (any 4xx) allows all; one that
the server fails to give (5xx, 429) forbids all for now, as RFC 9309 has it, with a reason that can heal; one that does
not come whole, is too long or leads nowhere allows all. A host that cannot be reached is asked no further.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import ipaddress
import os
import queue
import re
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from data_tools.files import read_regular_file
from data_tools.image import PictureError
from data_tools.robots import Rule, find_opt_out, is_allowed, parse_robots

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

MAX_FILE_BYTES = 512 * 2**20
"""Of a local file. What comes over a network has its own, smaller limit."""

HEALABLE = frozenset(
    {
        "time-out",
        "too slow",
        "connection failed",
        "answer cut off",
        "name resolution failed",
        "server error",
        "too many requests",
        "robots.txt unavailable",
        "storage failure",
    }
)
"""Reasons of a FetchError that may be gone at a later try."""

_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ENCODED_URL = re.compile(r"https?://[a-z0-9.-]+(?::[0-9]{1,5})?/(?:[!$&-;=?-Z_a-z~]|%[0-9A-Fa-f]{2})*")
"""A URL that can be sent as it is: signatures may cover its very spelling."""

_BAD_PORTS = frozenset(
    [0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109]
    + [110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530]
    + [531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190]
    + [5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080]
)
"""Ports of other protocols, which browsers do not ask either: https://fetch.spec.whatwg.org/#port-blocking"""

_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CLOUD_ADDRESSES = frozenset(map(ipaddress.ip_address, ["168.63.129.16", "192.88.99.1"]))
"""Public by their number only: Azure's host agent, the old 6to4 relay."""

_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY_RESOLVER_ERRORS = (socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM, socket.EAI_MEMORY)
_RESOLVER_THREADS = 16
_RESOLVER_TRIES = 3
_RESOLVED_FOR_S = 300.0
_UNRESOLVED_FOR_S = 10.0
_STORE_THREADS = 16
_EXPECTED_BYTES = 2**20
"""Set aside for a picture before its size is known."""

_MAX_ROBOTS_BYTES = 512 * 2**10
_MAX_BACKOFF_S = 20.0
_STOP_TIMEOUT_S = 10.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs"), "adlfs"),
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "oss": "ossfs",
}
"""Packages that teach fsspec a scheme."""


class FetchError(PictureError):
    """A picture that could not be had; HEALABLE lists the reasons that a later try may find gone."""


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch. Raises UserError for a number that makes no sense.

    image_root: folder that local names start from; None refuses local names.
    timeout_s: for one attempt from its first byte sent to its last received; connect_timeout_s and read_timeout_s: for
        the connection with its name lookup and TLS, and between two reads.
    min_bytes_per_s: a body that is slower than this on average, `slow_after_s` or later, is given up.
    retries: further attempts, of reasons in HEALABLE only, after backoff_s, then twice as long, and so on. An object
        store has the time of all attempts, since its driver makes its own.
    max_wait_s: the longest `Retry-After` that is waited for; a host that asks for more is not asked again.
    concurrency, per_host: pictures at a time, altogether and of one host.
    max_bytes: of one picture that comes over a network; max_held_bytes: of all pictures that are fetched ahead.
    allow_private: also connect to private, loopback, link-local, reserved and multicast addresses.
    respect_opt_out: follow robots.txt and X-Robots-Tag.
    trust_env: use the proxies of the environment (http_proxy, ...). A proxy resolves names itself, so addresses are
        then its own to judge.
    schemes: of object stores, read by fsspec drivers with the credentials that these find.
    """

    image_root: str | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 10.0
    min_bytes_per_s: float = 1000.0
    slow_after_s: float = 5.0
    retries: int = 2
    backoff_s: float = 0.5
    max_wait_s: float = 30.0
    concurrency: int = 64
    per_host: int = 16
    max_bytes: int = 64 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_redirects: int = 5
    allow_private: bool = False
    respect_opt_out: bool = True
    user_agent: str = "image-text-pretrain/0.1"
    trust_env: bool = False
    schemes: tuple[str, ...] = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "oci", "oss", "memory")

    def __post_init__(self) -> None:
        may_be_zero = ("retries", "backoff_s", "max_wait_s", "max_redirects", "min_bytes_per_s", "slow_after_s")
        for option in fields(self):
            value, name = getattr(self, option.name), option.name
            if type(value) in (int, float) and not (value > 0 or (value == 0 and name in may_be_zero)):
                valid = "0 or more" if name in may_be_zero else "more than 0"
                raise UserError(f"--{name.replace('_', '-')} {value}: give {valid}")
        if not re.fullmatch(r"[A-Za-z_][\w-]*(?:[/ ][ -~]*)?", self.user_agent, re.ASCII):
            raise UserError(
                f"--user-agent {self.user_agent!r}: begin with a name of letters, digits, _ and - that robots.txt can "
                "use, such as 'my-crawler/1.0 (+https://example.org/crawler)'"
            )

    @property
    def agent(self) -> str:
        """The product token that robots.txt and X-Robots-Tag may name."""
        return re.match(r"[\w-]+", self.user_agent).group()


def fetch_all(names: Sequence[str], options: FetchOptions) -> Iterator[bytes | FetchError]:
    """Yield the bytes of each picture, or why they could not be had, in the order of `names`.

    Local paths are read when their turn comes; what lies behind http(s):// and `options.schemes` is fetched ahead, up
    to 8 x concurrency names and `max_held_bytes` (the next in order has room in any case), by one event loop in a
    thread that ends with the iterator: close it when leaving it early. The waits before new attempts derive from the
    name and the attempt, not from a clock. Raises UserError when a scheme's driver is not installed, and OSError of
    the local storage.
    """
    ahead: collections.deque[_Item | str] = collections.deque()  # local names are just names
    remaining = iter(names)
    with contextlib.ExitStack() as stack:
        downloader: _Downloader | None = None
        fetched: _Item | None = None
        while True:
            new = []
            while len(ahead) < 8 * options.concurrency and (name := next(remaining, None)) is not None:
                is_local = _find_scheme(name) in ("", "file")
                ahead.append(name if is_local else _Item(name))
                if not is_local:
                    new.append(ahead[-1])
            if not ahead:
                return
            if new and downloader is None:
                downloader = stack.enter_context(_Downloader(options))
            item = ahead.popleft()
            wanted = None if isinstance(item, str) else item
            if downloader is not None:
                downloader.advance(new, fetched, wanted)
            fetched = wanted
            yield _read_local(item, options) if wanted is None else wanted.result.result()


def read_picture(root: str | Path, name: str) -> bytes:
    """The bytes of the file `name` under `root`. The name comes from a table and may not lead out of `root`.

    Raises FetchError for such a name and for a file that is missing or is none; an error of the storage is raised as
    it is, since a later run may well succeed.
    """
    if not name or "\0" in name:
        raise FetchError("no image name", repr(name))
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise FetchError("image name leads out of the image root", name)
    path = f"{root}/{name}"
    try:
        return read_regular_file(path, MAX_FILE_BYTES, FetchError, name)
    except (FileNotFoundError, NotADirectoryError):
        raise FetchError("missing picture", name) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise FetchError("not a file", name) from None
        if error.errno in _UNREADABLE:
            raise FetchError("unreadable picture", f"{name}: {error.strerror}") from None
        error.filename = path
        raise


def is_public(address: str) -> bool:
    """Whether the IP address belongs to the public internet; those that embed an IPv4 address are judged by that."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if embedded is None and parsed in _NAT64:
            embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is None:
            return parsed in _GLOBAL_IPV6 and parsed.is_global and parsed.teredo is None
        parsed = embedded
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed in _CLOUD_ADDRESSES)


def _find_scheme(name: str) -> str:
    """The scheme of a URL in lower case, "" for a local path."""
    match = _SCHEME.match(name) if "://" in name else None
    return match.group(1).lower() if match else ""


def _read_local(name: str, options: FetchOptions) -> bytes | FetchError:
    """Read a path, or a file:// URL, which is bound to the image root as well."""
    try:
        if options.image_root is None:
            raise FetchError("no image root", f"{name} is a local path, and there is no folder that it starts from")
        if _find_scheme(name) == "file":
            root = Path(options.image_root).absolute()
            path = name[len("file://") :].removeprefix("localhost")
            inside = path.startswith("/") and PurePosixPath(path).is_relative_to(root)
            if not inside:
                raise FetchError("image name leads out of the image root", name)
            name = str(PurePosixPath(path).relative_to(root))
        return read_picture(options.image_root, name)
    except FetchError as error:
        return error


# The event loop


@dataclass(eq=False)
class _Item:
    """One name on its way. All but `result` belongs to the event loop's thread."""

    name: str
    result: "concurrent.futures.Future[bytes | FetchError]" = field(default_factory=concurrent.futures.Future)
    held: int = 0
    """Bytes that it has of the room."""
    needs: int = 0
    """Bytes that it did not get when it asked last."""
    wanted: bool = False
    """It is the next in order: all wait for it, so it gets room in any case."""


class _NoRoom(Exception):
    """Raised where an item needs more room than there is; it begins again when there is."""


class _Final(Exception):
    """Raised with a FetchError's arguments where another attempt in this run would be of no use."""


class _Room:
    """Bounds the bytes of all items together; used by the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: dict[_Item, asyncio.Future] = {}

    def hold(self, item: _Item, count: int) -> None:
        """Let the item hold `count` bytes altogether. Raises _NoRoom."""
        if count > item.held and self._used + count - item.held > self._limit and not item.wanted:
            item.needs = count
            raise _NoRoom
        shrinks = count < item.held
        self._used += count - item.held
        item.held = count
        if shrinks:
            self._wake_who_fits()

    def release(self, item: _Item) -> None:
        """Take all of the item's bytes back."""
        self._used -= item.held
        item.held = 0
        self._wake_who_fits()

    def _wake_who_fits(self) -> None:
        """Wake those for whom there is room now, in the order in which they came."""
        free = self._limit - self._used
        while self._waiting and free >= (first := next(iter(self._waiting))).needs:
            free -= first.needs
            self._wake(first)

    def want(self, item: _Item) -> None:
        """Tell that all wait for the item now."""
        item.wanted = True
        if item in self._waiting:
            self._wake(item)

    async def wait(self, item: _Item) -> None:
        """Wait until another try is worth while."""
        if not item.wanted:
            self._waiting[item] = asyncio.get_running_loop().create_future()
            await self._waiting[item]

    def _wake(self, item: _Item) -> None:
        future = self._waiting.pop(item)
        if not future.done():
            future.set_result(None)


class _Host:
    """What is known of one host: how many may ask at a time, and from when on."""

    def __init__(self, per_host: int) -> None:
        self.slots = asyncio.Semaphore(per_host)
        self.opens_at_s = 0.0
        """By the event loop's clock."""


class _Threads:
    """Threads for calls that block. They are daemons: one that hangs in a driver keeps no process from ending."""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._count, self._name = count, name
        self._threads: list[threading.Thread] = []

    def call(self, function: Callable, *arguments: Any) -> asyncio.Future:
        """Call the function in one of the threads; await the result. For the event loop's thread only."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._calls.put((future, function, arguments))
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
            self._threads[-1].start()
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads: idle ones at once, busy ones after the call that they are in."""
        for _ in self._threads:
            self._calls.put(None)
        patience_s = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, patience_s - time.monotonic()))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)


class _Downloader(contextlib.AbstractContextManager):
    """An event loop in a thread of its own, with all that its downloads share."""

    def __init__(self, options: FetchOptions) -> None:
        import urllib.request

        self._options = options
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[asyncio.Task, _Item | None] = {}
        self._room = _Room(options.max_held_bytes)
        self._slots = asyncio.Semaphore(options.concurrency)
        self._store_slots = asyncio.Semaphore(min(_STORE_THREADS, options.concurrency))
        self._hosts: dict[str, _Host] = {}
        self._robots: dict[URL, asyncio.Task[list[Rule] | FetchError]] = {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._proxies = urllib.request.getproxies() if options.trust_env else {}
        self.resolving = _Threads(_RESOLVER_THREADS, "fetch-resolve")
        self._reading = _Threads(min(_STORE_THREADS, options.concurrency), "fetch-store")
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already, after an error of its own
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def advance(self, new: list[_Item], fetched: _Item | None, wanted: _Item | None) -> None:
        """Start the new items, let go of the one that was yielded, and hurry the one that is wanted now."""
        self._loop.call_soon_threadsafe(self._advance, new, fetched, wanted)

    def _advance(self, new: list[_Item], fetched: _Item | None, wanted: _Item | None) -> None:
        for item in new:
            self.spawn(self._fetch(item), item)
        if wanted is not None:
            self._room.want(wanted)
        if fetched is not None:
            self._room.release(fetched)

    def spawn(self, coroutine: Coroutine, item: _Item | None = None) -> asyncio.Task:
        """Start a task, on the event loop's thread, that is cancelled at the end if it is not done."""
        task = self._loop.create_task(coroutine)
        self._tasks[task] = item
        task.add_done_callback(self._tasks.pop)
        return task

    def _run(self) -> None:
        """The thread's body. Whatever happens, no item is left without a result that somebody waits for."""
        try:
            self._loop.run_forever()
        finally:
            items = [item for item in self._tasks.values() if item is not None]
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(self._close())
            for item in items:
                if not item.result.done():
                    item.result.set_exception(RuntimeError("the thread that downloads has ended"))
            self._loop.close()

    async def _close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions.values():
            await session.close()
        await asyncio.sleep(0)  # transports report their end in the round after
        await self._loop.shutdown_asyncgens()
        self.resolving.close()
        self._reading.close()

    # One name

    async def _fetch(self, item: _Item) -> None:
        """Set the item's result: bytes, a FetchError, or an exception that is to end it all."""
        try:
            item.result.set_result(await self._try_often(item))
        except (FetchError, _Final) as error:
            self._room.release(item)
            item.result.set_result(FetchError(*error.args))  # a new one, whose traceback keeps no buffers alive
        except asyncio.CancelledError:
            item.result.set_exception(RuntimeError("the download was cancelled"))  # whoever waits is not left waiting
            raise
        except BaseException as error:
            item.result.set_exception(error)

    async def _try_often(self, item: _Item) -> bytes:
        attempt = 0
        while True:
            try:
                scheme = _find_scheme(item.name)
                if scheme in ("http", "https"):
                    return await self._follow(_parse_url(item.name), item)
                return await self._read_store(item, scheme)
            except _NoRoom:
                self._room.release(item)
                await self._room.wait(item)
            except FetchError as error:
                self._room.release(item)
                if error.reason not in HEALABLE or attempt >= self._options.retries:
                    raise
                await asyncio.sleep(_compute_backoff_s(item.name, attempt, self._options.backoff_s))
                attempt += 1

    async def _read_store(self, item: _Item, scheme: str) -> bytes:
        if scheme not in self._options.schemes or "::" in item.name:
            valid = ", ".join(("http", "https", "file", *self._options.schemes))
            raise FetchError("scheme refused", f"{scheme}:// is not one of {valid}, or has another behind it")
        patience_s = self._options.timeout_s * (self._options.retries + 1)  # drivers try again themselves
        async with self._store_slots:
            self._room.hold(item, max(item.needs, min(_EXPECTED_BYTES, self._options.max_bytes)))
            reading = self._reading.call(_read_with_fsspec, item.name, scheme, self._options.max_bytes)
            try:
                data = await asyncio.wait_for(reading, patience_s)
            except asyncio.TimeoutError:
                raise _Final("time-out", f"not read within {patience_s:g} s") from None
            self._room.hold(item, len(data))
            return data

    async def _follow(self, url: "URL", item: _Item | None) -> bytes:
        """Ask for the picture at `url`, or, without an item, for a robots.txt, through all redirects."""
        obeys = item is not None and self._options.respect_opt_out
        for _ in range(self._options.max_redirects + 1):
            self._check_url(url)
            if obeys:
                await self._check_robots(url)
            async with self._ask(url, item) as (response, started_s):
                if obeys:
                    _check_opt_out(response.headers, self._options.agent)
                if response.status in (200, 203):
                    return await self._read_body(response, started_s, item)
                if response.status not in _REDIRECTS:
                    raise self._describe_status(response)
                if not response.headers.get("Location", "").strip():
                    raise FetchError("unexpected answer", f"HTTP {response.status} without a Location")
                url = _parse_url(response.headers["Location"], url)
        raise FetchError("too many redirects", f"more than {self._options.max_redirects}")

    def _check_url(self, url: "URL") -> None:
        """Refuse what is known to be bad before any name is resolved. Raises FetchError."""
        if url.scheme not in ("http", "https"):
            raise FetchError("scheme refused", f"redirect to {url.scheme}://, not http or https")
        if url.port in _BAD_PORTS:
            raise FetchError("bad URL", f"port {url.port} is another protocol's")
        if _is_number(url.raw_host):
            self._check_address(url.raw_host)

    def _check_address(self, address: str) -> None:
        if not (self._options.allow_private or is_public(address)):
            raise FetchError("address refused", f"{address} is not a public address")

    async def _check_robots(self, url: "URL") -> None:
        """Raises FetchError where robots.txt says no, _Final where it could not be had."""
        origin = url.origin()
        if origin not in self._robots:
            self._robots[origin] = self.spawn(self._fetch_robots(origin / "robots.txt"))
        rules = await asyncio.shield(self._robots[origin])
        if isinstance(rules, FetchError):
            raise _Final(*rules.args)
        if not is_allowed(rules, type(url)(str(url)).raw_path_qs):  # parsed again, for its one normal spelling
            raise FetchError("opted out", "robots.txt")

    async def _fetch_robots(self, url: "URL") -> "list[Rule] | FetchError":
        """The rules of a host, or why none of its pictures may be asked for (see the head of this file)."""
        for attempt in range(self._options.retries + 1):
            try:
                return parse_robots(await self._follow(url, None), self._options.agent)
            except (FetchError, _Final) as error:
                reason, detail = error.args
                if reason in ("unknown host", "TLS failure"):
                    return FetchError(reason, detail)
                if reason in ("server error", "too many requests"):
                    failure = FetchError("robots.txt unavailable", detail)
                elif reason in ("connection failed", "name resolution failed"):
                    failure = FetchError(reason, detail)
                else:
                    return []
                if isinstance(error, _Final):
                    return failure
            if attempt < self._options.retries:
                await asyncio.sleep(_compute_backoff_s(str(url), attempt, self._options.backoff_s))
        return failure

    # One request

    @contextlib.asynccontextmanager
    async def _ask(self, url: "URL", item: _Item | None) -> "AsyncIterator[tuple[aiohttp.ClientResponse, float]]":
        """Send a request when the host and the limits let it; give the response, and when it was asked for."""
        host = self._find_host(url)
        async with host.slots, self._take_slot(host):
            if item is not None:
                self._room.hold(item, max(item.needs, min(_EXPECTED_BYTES, self._options.max_bytes)))
            proxy = self._choose_proxy(url)
            session = self._find_session(proxied=proxy is not None)
            started_s = self._loop.time()
            with _translate_errors(self._options):
                request = session.get(url, allow_redirects=False, proxy=proxy)
                response = await asyncio.wait_for(request, self._options.timeout_s)
                async with response:
                    yield response, started_s

    @contextlib.asynccontextmanager
    async def _take_slot(self, host: _Host) -> AsyncIterator[None]:
        """Hold one of the slots that all hosts share, at a time when the host may be asked. Raises _Final."""
        while True:
            while (delay_s := host.opens_at_s - self._loop.time()) > 0:
                if delay_s > self._options.max_wait_s:
                    raise _Final("too many requests", f"the host wants over {self._options.max_wait_s:g} s of rest")
                await asyncio.sleep(delay_s)
            async with self._slots:
                if host.opens_at_s <= self._loop.time():  # it may have closed while we queued
                    yield
                    return

    def _find_host(self, url: "URL") -> _Host:
        if url.raw_host not in self._hosts:
            self._hosts[url.raw_host] = _Host(self._options.per_host)
        return self._hosts[url.raw_host]

    def _choose_proxy(self, url: "URL") -> str | None:
        from urllib.request import proxy_bypass

        if url.scheme not in self._proxies or proxy_bypass(url.raw_host):
            return None
        return self._proxies[url.scheme]

    def _find_session(self, proxied: bool) -> "aiohttp.ClientSession":
        """The session for direct connections, which judges addresses, or the one for proxies, which cannot."""
        import aiohttp

        if proxied not in self._sessions:
            options = self._options

            def make_socket(address: tuple) -> socket.socket:
                family, kind, protocol, _, (host, *_) = address
                if not proxied:
                    self._check_address(host)
                return socket.socket(family, kind, protocol)

            connector = aiohttp.TCPConnector(
                limit=0,  # our own slots, which leave nobody waiting inside of a time-out
                use_dns_cache=False,
                resolver=_Resolver(self, options, public_only=not (proxied or options.allow_private)),
                socket_factory=make_socket,
            )
            self._sessions[proxied] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # see _Inflater
                trust_env=False,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=options.connect_timeout_s, sock_read=options.read_timeout_s
                ),
                headers={
                    "User-Agent": options.user_agent,
                    "Accept": "image/jpeg, image/png, image/webp, image/*;q=0.5, */*;q=0.3",
                    "Accept-Encoding": "identity",
                },
            )
        return self._sessions[proxied]

    def _describe_status(self, response: "aiohttp.ClientResponse") -> FetchError:
        """The failure that the status means; a wish to be left alone for a while is noted for the whole host."""
        status = response.status
        if status in (429, 503):
            rest_s = _parse_retry_after(response.headers)
            host = self._find_host(response.url)
            host.opens_at_s = max(host.opens_at_s, self._loop.time() + rest_s)
        if status in (404, 410):
            reason = "missing picture"
        elif status in (401, 402, 403, 407, 451):
            reason = "access denied"
        elif status == 408:
            reason = "time-out"
        elif status == 429:
            reason = "too many requests"
        else:
            reason = "server error" if 500 <= status < 600 else "unexpected answer"
        return FetchError(reason, f"HTTP {status}")

    async def _read_body(self, response: "aiohttp.ClientResponse", started_s: float, item: _Item | None) -> bytes:
        """The body, undone of gzip or deflate. Of a robots.txt, only the part that has to be read."""
        options = self._options
        limit = _MAX_ROBOTS_BYTES if item is None else options.max_bytes
        too_large = FetchError("file too large", f"more than {limit} bytes")
        if item is not None and response.content_length is not None:
            if response.content_length > limit:
                raise too_large
            self._room.hold(item, max(item.held, response.content_length))
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("br", "zstd", "compress", "x-compress") or "," in encoding:
            raise FetchError("unexpected answer", f"Content-Encoding {encoding[:40]!r}, though none was asked for")
        inflater = _Inflater(limit) if encoding in ("gzip", "x-gzip", "deflate") else None
        chunks, size, received = [], 0, 0
        body_started_s = self._loop.time()
        while chunk := await response.content.readany():
            now_s = self._loop.time()
            received += len(chunk)
            if now_s - started_s > options.timeout_s:
                raise FetchError("time-out", f"not all there within {options.timeout_s:g} s")
            duration_s = now_s - body_started_s
            if duration_s > options.slow_after_s and received < options.min_bytes_per_s * duration_s:
                raise FetchError("too slow", f"less than {options.min_bytes_per_s:g} bytes/s")
            if inflater is not None:
                chunk = inflater.inflate(chunk)
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                if item is None:
                    break
                raise too_large
            if item is not None:
                self._room.hold(item, max(item.held, size))
        if inflater is not None:
            inflater.check_end()
        if item is not None:
            self._room.hold(item, size)
        return b"".join(chunks)[:limit]


class _Inflater:
    """Undoes gzip or deflate to one byte beyond a limit at most, so that a small answer cannot fill the memory."""

    def __init__(self, limit: int) -> None:
        self._left = limit + 1
        self._stream: Any = None

    def inflate(self, data: bytes) -> bytes:
        if self._stream is None:
            # gzip and zlib begin with headers; some servers send deflate without one.
            wrapped = data[:1] == b"\x1f" or data[:1] and data[0] & 0x0F == 8
            self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32 if wrapped else -zlib.MAX_WBITS)
        try:
            inflated = self._stream.decompress(data, self._left) if self._left else b""
        except zlib.error as error:
            raise FetchError("unexpected answer", f"damaged compression: {error}") from None
        self._left -= len(inflated)
        return inflated

    def check_end(self) -> None:
        if self._stream is not None and not self._stream.eof and self._left:
            raise FetchError("answer cut off", "the compressed answer has no end")


class _Resolver:
    """Names -> addresses for aiohttp: few lookups at a time, each once, tried again when the name server is busy.

    Name servers that are asked for thousands of names at once answer with temporary failures, which then look like dead
    links. A lookup that takes longer than a download waits for it goes on, and the next attempt finds its answer.
    """

    def __init__(self, downloader: _Downloader, options: FetchOptions, public_only: bool) -> None:
        self._downloader, self._options, self._public_only = downloader, options, public_only
        self._lookups: dict[str, asyncio.Task] = {}

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict[str, Any]]:
        """The addresses, as aiohttp wants them. Raises FetchError."""
        if host not in self._lookups:
            self._lookups[host] = self._downloader.spawn(self._look_up(host))
            self._lookups[host].add_done_callback(lambda task: self._expire(host, task))
        lookup = asyncio.shield(self._lookups[host])
        try:
            found = await asyncio.wait_for(lookup, self._options.connect_timeout_s)
        except asyncio.TimeoutError:
            raise FetchError("name resolution failed", f"{host}: no answer in time") from None
        if isinstance(found, FetchError):
            raise FetchError(*found.args)
        public = [address for address in found if not self._public_only or is_public(address)]
        if not public:
            raise FetchError("address refused", f"{host} is {found[0]}, not a public address")
        kind = {"hostname": host, "port": port, "proto": socket.IPPROTO_TCP, "flags": socket.AI_NUMERICHOST}
        return [
            {**kind, "host": address, "family": socket.AF_INET6 if ":" in address else socket.AF_INET}
            for address in public
        ]

    async def close(self) -> None:
        """Part of aiohttp's interface; the lookups end with the downloader's other tasks."""

    async def _look_up(self, host: str) -> "list[str] | FetchError":
        for attempt in range(_RESOLVER_TRIES):
            if attempt:
                await asyncio.sleep(_compute_backoff_s(host, attempt, self._options.backoff_s))
            try:
                found = await self._downloader.resolving.call(
                    socket.getaddrinfo, host, None, socket.AF_UNSPEC, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG
                )
                return list(dict.fromkeys(entry[4][0] for entry in found)) or FetchError("unknown host", host)
            except socket.gaierror as error:
                failure = error
                if error.errno not in _TEMPORARY_RESOLVER_ERRORS:
                    return FetchError("unknown host", host)
            except UnicodeError:
                return FetchError("bad URL", f"{host[:80]!r} is no host name")
        return FetchError("name resolution failed", f"{host}: {failure.strerror}")

    def _expire(self, host: str, task: asyncio.Task) -> None:
        if task.cancelled():
            return
        known = task.exception() is None and not isinstance(task.result(), FetchError)
        delay_s = _RESOLVED_FOR_S if known else _UNRESOLVED_FOR_S
        asyncio.get_running_loop().call_later(delay_s, self._lookups.pop, host, None)


@contextlib.contextmanager
def _translate_errors(options: FetchOptions) -> Iterator[None]:
    """Turn what aiohttp and the system raise into FetchErrors; details name no addresses that may differ next time."""
    import aiohttp

    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        detail = f"no connection within {options.connect_timeout_s:g} s"
        raise FetchError("connection failed", detail) from None
    except aiohttp.SocketTimeoutError:
        raise FetchError("time-out", f"silent for {options.read_timeout_s:g} s") from None
    except asyncio.TimeoutError:
        raise FetchError("time-out", f"no answer within {options.timeout_s:g} s") from None
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
        raise FetchError("TLS failure", getattr(error.__cause__, "reason", None) or type(error).__name__) from None
    except aiohttp.ClientPayloadError as error:
        raise FetchError("answer cut off", _shorten(error)) from None
    except aiohttp.InvalidURL as error:
        raise FetchError("bad URL", _shorten(error)) from None
    except aiohttp.ServerDisconnectedError:
        raise FetchError("connection failed", "closed before there was an answer") from None
    except (OSError, aiohttp.ClientConnectionError) as error:
        number = getattr(error, "errno", None)
        raise FetchError("connection failed", os.strerror(number) if number else type(error).__name__) from None
    except aiohttp.ClientError as error:
        raise FetchError("unexpected answer", _shorten(error)) from None


def _shorten(error: Exception) -> str:
    """The first line of an error's text, which may quote what a server has sent."""
    text = getattr(error, "message", "") or str(error) or type(error).__name__
    return ascii(text.strip().splitlines()[0][:120])[1:-1] if text.strip() else type(error).__name__


def _parse_url(text: str, base: "URL | None" = None) -> "URL":
    """The URL, which may be relative to `base`; sent as it is spelled if it needs no quoting. Raises FetchError."""
    from yarl import URL

    text = text.strip()
    try:
        if _CONTROL.search(text):
            raise ValueError("control characters")
        url = URL(text, encoded=_ENCODED_URL.fullmatch(text) is not None).with_fragment(None)
        if base is not None and not url.scheme:
            url = base.join(url)
        if url.scheme in ("http", "https") and not (url.raw_host and url.port):  # both are parsed only here
            raise ValueError("no host" if not url.raw_host else "port 0")
        return url
    except ValueError as error:
        raise FetchError("bad URL", _shorten(error)) from None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_opt_out(headers: Any, agent: str) -> None:
    """Raises FetchError where the answer's headers forbid to keep it."""
    directive = find_opt_out(headers.getall("X-Robots-Tag", ()), agent)
    if directive:
        raise FetchError("opted out", f"X-Robots-Tag {directive}")
    if headers.get("tdm-reservation", "").strip() == "1":
        raise FetchError("opted out", "tdm-reservation 1")


def _parse_retry_after(headers: Any) -> float:
    """Seconds from now that Retry-After names, as a number or a date; 0 without one or for nonsense."""
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        until = parsedate_to_datetime(value).timestamp()
        now = headers.get("Date")  # the server's clock, if it tells the time
        return max(0.0, until - (parsedate_to_datetime(now).timestamp() if now else time.time()))
    except (TypeError, ValueError, IndexError, OverflowError, OSError):
        return 0.0


def _compute_backoff_s(name: str, attempt: int, base_s: float) -> float:
    """Twice as long for each attempt, times 0.5 to 1.5 as the name and the attempt have it."""
    digest = hashlib.blake2b(f"{attempt} {name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return min(_MAX_BACKOFF_S, base_s * 2**attempt) * (0.5 + int.from_bytes(digest, "big") / 2**64)


def _read_with_fsspec(name: str, scheme: str, max_bytes: int) -> bytes:
    """Read a whole object. Raises FetchError, _Final, and UserError where the driver is not installed."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        if scheme not in fsspec.available_protocols() or isinstance(error, ImportError):
            package = _DRIVERS.get(scheme, f"a driver of fsspec for {scheme}://")
            raise UserError(f"{name}: to read {scheme}:// install {package} ({error})") from None
        raise FetchError("bad URL", _shorten(error)) from None
    try:
        data = system.cat_file(path, start=0, end=max_bytes + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FetchError("missing picture", name) from None
    except PermissionError as error:
        raise FetchError("access denied", _shorten(error)) from None
    except Exception as error:
        # Each driver has errors of its own, and retries of its own.
        raise _Final("storage failure", f"{type(error).__name__}: {_shorten(error)}") from None
    if len(data) > max_bytes:
        raise FetchError("file too large", f"more than {max_bytes} bytes")
    return data
