"""Deterministic USTAR members: the same name and bytes always make the same archive bytes.

A member is a header of 512 bytes and its data, padded with zeros to a multiple of 512. `mtime` is 0, the owner is
0/0 without names and the mode is 0644, so nothing of the host or the hour gets into a shard. An archive ends with two
blocks of zeros. What others write is read too: PAX and GNU headers, long names, folders between the files.
Sources: POSIX.1-1988 (ustar), POSIX.1-2001 (pax), the GNU tar manual.
"""

import re
from collections.abc import Callable, Generator
from typing import NamedTuple

BLOCK_BYTES = 512
ARCHIVE_END = bytes(2 * BLOCK_BYTES)
MAX_NAME_BYTES = 100
MAX_MEMBER_BYTES = 8**11 - 1

_HEADER_AFTER_MODE = b"0000000\0" + b"0000000\0"  # owner and group number
_HEADER_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(32) + bytes(32) + bytes(8) + bytes(8) + bytes(167)
_EMPTY_CHECKSUM = b" " * 8
_REGULAR, _PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _FOLDER = (b"0\0", b"x", b"g", b"L", b"K", b"5")
_MAX_EXTENSION_BYTES = 2**20
_OF_A_SAMPLE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_OF_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One regular file of an archive: `offset` is where its first header begins, `end` where the next member does."""

    name: str
    offset: int
    start: int  # of its data
    size: int
    end: int


class TarError(ValueError):
    """Bytes that are not whole USTAR members; `offset` is where, in bytes from the start of what was parsed."""

    def __init__(self, text: str, offset: int) -> None:
        super().__init__(text, offset)
        self.text = text
        self.offset = offset


def render_member(name: str, data: bytes) -> bytes:
    """The archive bytes of one regular file, header and padding included.

    Raises ValueError for a name that is empty, not ASCII or longer than 100 bytes, and for 8 GiB of data or more.
    """
    encoded = name.encode("ascii", errors="replace")
    if not name or not name.isascii() or len(encoded) > MAX_NAME_BYTES:
        raise ValueError(f"member name {name!r}: a name has 1 to {MAX_NAME_BYTES} ASCII characters")
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name}: {len(data)} bytes do not fit, a member holds at most {MAX_MEMBER_BYTES}")
    before = encoded.ljust(MAX_NAME_BYTES, b"\0") + b"0000644\0" + _HEADER_AFTER_MODE
    before += b"%011o\0" % len(data) + b"%011o\0" % 0  # size, modification time
    checksum = sum(before) + sum(_EMPTY_CHECKSUM) + sum(_HEADER_AFTER_CHECKSUM)
    return b"".join(
        (before, b"%06o\0 " % checksum, _HEADER_AFTER_CHECKSUM, data, bytes(-len(data) % BLOCK_BYTES)),
    )


def walk_members(read: Callable[[int, int], bytes], total: int, is_part: bool = False) -> Generator[Member, None, int]:
    """The regular files of an archive of `total` bytes, in order; `read(start, end)` gives bytes of it.

    Only headers are read, and every one's checksum is verified. The walk ends at the archive's end blocks, which a part
    of an archive must not have, and returns where. Raises TarError for a damaged header, a link or a device, and for data that ends too
    early.
    """
    position, offset = 0, 0
    name = size = None  # what an extension header says of the member that follows it
    while position < total:
        header = read(position, position + BLOCK_BYTES)
        if header == bytes(BLOCK_BYTES) and not is_part:
            return position
        kind, own_name, own_size = _parse_header(header, position)
        start = position + BLOCK_BYTES
        if kind in _REGULAR and size is not None:
            own_size = size
        end = start + own_size + -own_size % BLOCK_BYTES
        if start + own_size > total:
            raise TarError(f"member {own_name} has {own_size} bytes of data, but {total - start} follow", position)
        if kind in (_PAX, _GNU_NAME):
            if own_size > _MAX_EXTENSION_BYTES:
                raise TarError(f"an extension header of {own_size} bytes", position)
            data = read(start, start + own_size)
            if kind == _GNU_NAME:
                name = data.rstrip(b"\0").decode("utf-8", "backslashreplace")
            else:
                records = _parse_pax(data, position)
                name = records.get("path", name)
                size = _parse_size(records["size"], position) if "size" in records else size
        elif kind in _REGULAR:
            yield Member(name or own_name, offset, start, own_size, end)
            name, size, offset = None, None, end
        elif kind == _FOLDER:
            name, size, offset = None, None, end
        elif kind == _PAX_GLOBAL:
            offset = end if offset == position else offset  # of no member, as tarfile (and so Energon) has it
        elif kind != _GNU_LINK:
            raise TarError(f"member {own_name!r} is not a regular file (kind {kind.decode('latin-1')!r})", position)
        position = end
    return position


def parse_members(data: bytes) -> dict[str, bytes]:
    """Read a run of whole members, without the archive's end blocks, into {name: data} in archive order.

    Every header's checksum is verified. Raises TarError for a damaged header, a link or a device, a name given twice,
    or data that ends too early.
    """
    members: dict[str, bytes] = {}
    for member in walk_members(lambda start, end: data[start:end], len(data), is_part=True):
        if member.name in members:
            raise TarError(f"member {member.name} is there twice", member.offset)
        members[member.name] = data[member.start : member.start + member.size]
    return members


def is_sample_file(name: str) -> bool:
    """Whether webdataset and Energon count a file of this name to a sample: it has an extension, and is not __meta__."""
    return _OF_A_SAMPLE.match(name) is not None and _OF_NO_SAMPLE.match(name) is None


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset has them: the first dot after the last slash parts the two."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def _parse_header(header: bytes, position: int) -> tuple[bytes, str, int]:
    """Return the member's kind, its name and its size in bytes."""
    if len(header) < BLOCK_BYTES:
        raise TarError(f"the header has {len(header)} of {BLOCK_BYTES} bytes", position)
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else int(header[124:136].strip(b" \0"), 8)
    except ValueError:
        raise TarError("the header is damaged: its size or checksum cannot be read", position) from None
    if stored != sum(header) - sum(header[148:156]) + sum(_EMPTY_CHECKSUM):
        raise TarError("the header is damaged: its checksum does not match", position)
    name = header[:MAX_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "backslashreplace")
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].partition(b"\0")[0].decode("utf-8", "backslashreplace") + "/" + name
    if header[257:262] != b"ustar" or not name or size < 0:
        raise TarError(f"member {name!r} is not a regular USTAR file", position)
    return header[156:157], name, size


def _parse_pax(data: bytes, position: int) -> dict[str, str]:
    """The records of a PAX header: "LENGTH KEYWORD=VALUE\\n", the length counting the whole record."""
    records, place = {}, 0
    while place < len(data):
        digits, space, _ = data[place : place + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1 or place + int(digits) > len(data):
            raise TarError("a PAX header is damaged", position)
        keyword, equals, value = data[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        if not equals:
            raise TarError("a PAX header is damaged", position)
        records[keyword.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        place += int(digits)
    return records


def _parse_size(text: str, position: int) -> int:
    if not text.isascii() or not text.isdigit():
        raise TarError("a PAX header is damaged: its size is not a number", position)
    return int(text)
