"""Deterministic USTAR members: the same name and bytes always make the same archive bytes.

A member is a header of 512 bytes and its data, padded with zeros to a multiple of 512. `mtime` is 0, the owner is
0/0 without names and the mode is 0644, so nothing of the host or the hour gets into a shard. An archive ends with two
blocks of zeros. Source: POSIX.1-1988 (ustar).
"""

BLOCK_BYTES = 512
ARCHIVE_END = bytes(2 * BLOCK_BYTES)
MAX_NAME_BYTES = 100
MAX_MEMBER_BYTES = 8**11 - 1

_HEADER_AFTER_MODE = b"0000000\0" + b"0000000\0"  # owner and group number
_HEADER_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(32) + bytes(32) + bytes(8) + bytes(8) + bytes(167)
_EMPTY_CHECKSUM = b" " * 8


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


def parse_members(data: bytes) -> dict[str, bytes]:
    """Read a run of whole members, without the archive's end blocks, into {name: data} in archive order.

    Every header's checksum is verified. Raises TarError for a damaged header, anything but a regular file, a name given
    twice, or data that ends too early.
    """
    members: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        name, size = _parse_header(data[position : position + BLOCK_BYTES], position)
        start = position + BLOCK_BYTES
        if start + size > len(data):
            raise TarError(f"member {name} has {size} bytes of data, but {len(data) - start} follow", position)
        if name in members:
            raise TarError(f"member {name} is there twice", position)
        members[name] = data[start : start + size]
        position = start + size + -size % BLOCK_BYTES
    return members


def _parse_header(header: bytes, position: int) -> tuple[str, int]:
    """Return the member's name and its size in bytes."""
    if len(header) < BLOCK_BYTES:
        raise TarError(f"the header has {len(header)} of {BLOCK_BYTES} bytes", position)
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0"), 8)
        name = header[:MAX_NAME_BYTES].rstrip(b"\0").decode("ascii")
    except ValueError:
        raise TarError("the header is damaged: its name, size or checksum cannot be read", position) from None
    if stored != sum(header) - sum(header[148:156]) + sum(_EMPTY_CHECKSUM):
        raise TarError("the header is damaged: its checksum does not match", position)
    if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0") or not name or size < 0:
        raise TarError(f"member {name!r} is not a regular USTAR file", position)
    return name, size
