"""Deterministic USTAR members: the same name and bytes always make the same archive bytes.

A member is a header of 512 bytes and its data, padded with zeros to a multiple of 512. `mtime` is 0, the owner is
0/0 without names and the mode is 0644, so nothing of the host or the hour gets into a shard. An archive ends with two
blocks of zeros.

What others write is read too: USTAR, GNU, PAX and the old V7 archives, by their headers alone. Nothing is unpacked, and a
name is only a name: it is never used as a path, so `../x` and `/etc/x` can do no harm.

Sources: POSIX.1-1988 (ustar), POSIX.1-2017 (pax), the GNU tar 1.35 manual ("Basic Tar Format").
"""

import re
import zlib
from collections.abc import Callable, Generator
from typing import NamedTuple

BLOCK_BYTES = 512
ARCHIVE_END = bytes(2 * BLOCK_BYTES)
MAX_NAME_BYTES = 100
MAX_MEMBER_BYTES = 8**11 - 1

_HEADER_AFTER_MODE = b"0000000\0" + b"0000000\0"  # owner and group number
_HEADER_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(32) + bytes(32) + bytes(8) + bytes(8) + bytes(167)
_EMPTY_CHECKSUM = b" " * 8
_EMPTY_SUM = sum(_EMPTY_CHECKSUM)
_HEADER_AFTER_NAME = b"0000644\0" + _HEADER_AFTER_MODE
_MODIFICATION_TIME = b"%011o\0" % 0
_CONSTANT_SUM = sum(_HEADER_AFTER_NAME + _MODIFICATION_TIME + _EMPTY_CHECKSUM + _HEADER_AFTER_CHECKSUM)
_ZEROS = bytes(BLOCK_BYTES)

MAX_EXTENSION_BYTES = 2**20
"""A longer name or PAX header is refused: it would be held in memory."""

FILE, FOLDER, LINK, DEVICE, OTHER = "file", "folder", "link", "device", "other"
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), FILE),
    **dict.fromkeys((b"1", b"2"), LINK),
    **dict.fromkeys((b"3", b"4", b"6"), DEVICE),
    b"5": FOLDER,
    b"D": FOLDER,
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE, _GNU_LABEL = b"L", b"K", b"S", b"V"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"x", b"g", b"X"
_OF_A_SAMPLE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_OF_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One member of an archive. `offset` is where its first header starts, those of a long name or of PAX included."""

    name: str  # bytes that are not UTF-8 as \\xNN
    kind: str  # FILE, ...
    offset: int
    start: int  # of its data
    size: int

    @property
    def end(self) -> int:
        """Behind the padded data: where the next member starts."""
        return self.start + self.size + -self.size % BLOCK_BYTES


class TarError(ValueError):
    """Bytes that are not whole USTAR members; `offset` is where, in bytes from the start of what was parsed."""

    def __init__(self, text: str, offset: int) -> None:
        super().__init__(text, offset)
        self.text = text
        self.offset = offset


def render_member(name: str, data: bytes) -> bytes:
    """The archive bytes of one regular file, header and padding included; raises ValueError as `render_header` does."""
    return b"".join((render_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES)))


def render_header(name: str, size: int) -> bytes:
    """The header, 512 bytes, of a regular file with `size` bytes of data.

    Raises ValueError for a name that is empty, not ASCII or longer than 100 bytes, and for 8 GiB of data or more.
    """
    if not name or not name.isascii() or len(name) > MAX_NAME_BYTES:
        raise ValueError(f"member name {name!r}: a name has 1 to {MAX_NAME_BYTES} ASCII characters")
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name}: {size} bytes do not fit, a member holds at most {MAX_MEMBER_BYTES}")
    encoded, octal = name.encode(), b"%011o\0" % size
    checksum = b"%06o\0 " % (sum(encoded) + sum(octal) + _CONSTANT_SUM)
    padded = encoded.ljust(MAX_NAME_BYTES, b"\0")
    return b"".join((padded, _HEADER_AFTER_NAME, octal, _MODIFICATION_TIME, checksum, _HEADER_AFTER_CHECKSUM))


def read_headers(read: Callable[[int, int], bytes], total: int, is_part: bool = False) -> Generator[Member, None, int]:
    """The members of an archive of `total` bytes, of any kind, in order; `read(start, end)` gives bytes of it.

    Only headers are read, and every one's checksum is verified. The walk ends at the archive's end blocks, which a part
    of an archive must not have, or with its bytes, and returns where. Raises TarError, with the offset, for a damaged
    header and where the bytes end too early; what came before is good. Only the padding of the last member may be cut
    short: the end that is returned then lies beyond `total`.
    """
    position = 0
    start = None  # of the member that extension headers have begun
    extension: dict[str, bytes] = {}
    if total == 0 and not is_part:
        raise TarError("the file is empty", 0)
    while position < total:
        header = read(position, position + BLOCK_BYTES)
        if not is_part and header == _ZEROS:
            break
        kind, size, name = _parse_header(header, position)
        if kind in _WITHOUT_DATA:
            size = 0  # some writers give a link the size of its target
        data_start = position + BLOCK_BYTES
        if kind == _PAX_GLOBAL:  # belongs to no member, as tarfile (and so Energon) has it; nothing in it counts here
            _check_extension(data_start, size, total, position)
            position = data_start + size + -size % BLOCK_BYTES
            continue
        start = position if start is None else start
        if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_SOLARIS):
            _check_extension(data_start, size, total, position)
            if kind == _GNU_LONG_NAME:
                extension["path"] = read(data_start, data_start + size)
            elif kind != _GNU_LONG_LINK:
                extension |= _parse_pax(read(data_start, data_start + size), position)
            position = data_start + size + -size % BLOCK_BYTES
            continue
        is_sparse = kind == _GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in extension)
        if kind == _GNU_SPARSE:
            data_start = _skip_sparse_map(read, header, data_start)
        if "size" in extension and kind not in _WITHOUT_DATA:
            size = _parse_decimal(extension["size"], start)
        name = extension.get("path", name).partition(b"\0")[0]
        if data_start + size > total:
            follow = max(0, total - data_start)
            raise TarError(f"member {_decode(name)!r} has {size} bytes of data, but {follow} follow", start)
        if kind != _GNU_LABEL:
            word = OTHER if is_sparse else _KINDS.get(kind, OTHER)
            if word == FILE and name.endswith(b"/"):
                word = FOLDER  # as V7 archives have it
            yield Member(_decode(name), word, start, data_start, size)
        position = data_start + size + -size % BLOCK_BYTES
        start = None
        if extension:
            extension = {}
    if start is not None:
        raise TarError("the archive ends after a header that belongs to another", start)
    return position


def walk_members(read: Callable[[int, int], bytes], total: int, is_part: bool = False) -> Generator[Member, None, int]:
    """The regular files among what `read_headers` finds, for archives that hold nothing else but folders.

    Raises TarError as that does, and for a link, a device and what is no regular file otherwise.
    """
    members = read_headers(read, total, is_part)
    while True:
        try:
            member = next(members)
        except StopIteration as stop:
            return stop.value
        if member.kind == FILE:
            yield member
        elif member.kind != FOLDER:
            raise TarError(
                f"member {member.name!r} is not a regular file but of the kind: {member.kind}", member.offset
            )


def parse_members(data: bytes) -> dict[str, bytes]:
    """Read a run of whole members, without the archive's end blocks, into {name: data} in archive order.

    Every header's checksum is verified. Raises TarError for a damaged header, a link or a device, a name given twice,
    or data that ends too early.
    """
    members = _parse_plain(data)
    if members is not None:
        return members
    members = {}
    for member in walk_members(lambda start, end: data[start:end], len(data), is_part=True):
        if member.name in members:
            raise TarError(f"member {member.name} is there twice", member.offset)
        members[member.name] = data[member.start : member.start + member.size]
    return members


def _parse_plain(data: bytes) -> dict[str, bytes] | None:
    """The same of what almost every sample is: sound regular files of short ASCII names, in a quarter of the time. None where there
    is anything else, be it only unusual."""
    members: dict[str, bytes] = {}
    position, total = 0, len(data)
    while position < total:
        header = data[position : position + BLOCK_BYTES]
        octal, checksum = header[124:135], header[148:154]
        start = position + BLOCK_BYTES
        if start > total or header[156:157] not in (b"0", b"\0") or not (octal.isdigit() and checksum.isdigit()):
            return None
        if header[154:156] != b"\0 " or (header[257:262] == b"ustar" and header[345]):
            return None
        try:
            size, stored = int(octal, 8), int(checksum, 8)
            name = header[:MAX_NAME_BYTES].partition(b"\0")[0].decode("ascii")
        except ValueError:
            return None
        if stored != _add_up(header) - sum(header[148:156]) + _EMPTY_SUM:
            return None
        if not name or name.endswith("/") or name in members or start + size > total:
            return None
        members[name] = data[start : start + size]
        position = start + size + -size % BLOCK_BYTES
    return members


def is_sample_file(name: str) -> bool:
    """Whether webdataset and Energon count a file of this name to a sample: it has an extension, and is not __meta__."""
    return _OF_A_SAMPLE.match(name) is not None and _OF_NO_SAMPLE.match(name) is None


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset has them: the first dot after the last slash parts the two."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def _parse_header(header: bytes, position: int) -> tuple[bytes, int, bytes]:
    """Return the type, the size of the data in bytes, and the name."""
    if len(header) < BLOCK_BYTES:
        raise TarError(f"the header has {len(header)} of {BLOCK_BYTES} bytes", position)
    stored = _parse_number(header[148:156])
    computed = _add_up(header) - sum(header[148:156]) + _EMPTY_SUM
    if stored != computed:
        # Some old writers summed signed bytes.
        checked = header[:148] + header[156:]
        if stored != computed - 256 * sum(byte > 127 for byte in checked):
            raise TarError("the header is damaged: its checksum does not match", position)
    size = _parse_number(header[124:136])
    if size is None or size < 0:
        raise TarError("the header is damaged: its size cannot be read", position)
    name = header[:MAX_NAME_BYTES].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return header[156:157], size, name


def _add_up(header: bytes) -> int:
    """The sum of a block's bytes. Adler-32 has it in its lower half, plus one and modulo 65,521, which half a block's is below: a
    fiftieth of the time that `sum` takes."""
    half = BLOCK_BYTES // 2
    return (zlib.adler32(header[:half]) & 0xFFFF) + (zlib.adler32(header[half:]) & 0xFFFF) - 2


def _parse_number(field: bytes) -> int | None:
    """Octal digits, or a number of base 256 when the first bit is set (GNU)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _parse_decimal(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarError("the PAX header is damaged: its size cannot be read", position)
    return int(text)


def _check_extension(start: int, size: int, total: int, position: int) -> None:
    if size > MAX_EXTENSION_BYTES:
        raise TarError(f"a header of {size} bytes for a name, at most {MAX_EXTENSION_BYTES} are read", position)
    if start + size > total:
        raise TarError("the file ends in a header", position)


def _parse_pax(data: bytes, position: int) -> dict[str, bytes]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    records = {}
    place, data = 0, data.rstrip(b"\0")
    while place < len(data):
        digits = data[place : place + 20].partition(b" ")[0]
        end = place + int(digits) if digits.isdigit() else place
        key, equals, value = data[place + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise TarError("the PAX header is damaged", position)
        records[_decode(key)] = value[:-1]
        place = end
    return records


def _skip_sparse_map(read: Callable[[int, int], bytes], header: bytes, start: int) -> int:
    """Where the data of a GNU sparse file starts: after the blocks that go on with the map of its holes."""
    more = header[482:483].strip(b"\0")
    while more:
        more = read(start + 504, start + 505).strip(b"\0")
        start += BLOCK_BYTES
    return start


def _decode(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
