"""Tars that others wrote: where their members lie, learned from the headers alone. Nothing is unpacked.

Reads USTAR, GNU and PAX archives and the old V7 ones. A name is only a name here: it is never used as a path, so
`../x` and `/etc/x` can do no harm. Source: POSIX.1-2017 (pax), GNU tar 1.35 manual, "Basic Tar Format".
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_tools.tar import BLOCK_BYTES, TarError

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
_EMPTY_CHECKSUM = 8 * ord(" ")


class Member(NamedTuple):
    """One member of a tar. `offset` is where its first header starts, those of a long name or of PAX included."""

    name: str
    kind: str
    offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset after the padded data: where the next member starts."""
        return self.data_offset + self.size + -self.size % BLOCK_BYTES


def read_headers(file: BinaryIO) -> Iterator[Member]:
    """The members of the tar in `file` (which can seek), in order, without reading their data.

    The caller may seek and read in `file` between two members. Bytes of a name that are not UTF-8 become `\\xNN`.
    Raises TarError, with the offset, for a damaged header and where the file ends too early; what came before is good.
    """
    length = file.seek(0, 2)
    position = 0
    start = None  # of the member that extension headers have begun
    extension: dict[str, bytes] = {}
    while True:
        header = _read_at(file, position, BLOCK_BYTES)
        if not header.strip(b"\0") and len(header) in (0, BLOCK_BYTES):
            if start is not None:
                raise TarError("the archive ends after a header that belongs to another", start)
            if position == 0 and not header:
                raise TarError("the file is empty", 0)
            return
        kind, size, name = _parse_header(header, position)
        if kind in _WITHOUT_DATA:
            size = 0  # some writers give a link the size of its target
        start = position if start is None else start
        data_offset = position + BLOCK_BYTES
        if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_SOLARIS, _PAX_GLOBAL):
            data = _read_extension(file, data_offset, size, length, position)
            if kind == _GNU_LONG_NAME:
                extension["path"] = data
            elif kind in (_PAX, _PAX_SOLARIS):
                extension |= _parse_pax(data, position)
            position = data_offset + size + -size % BLOCK_BYTES
            continue
        sparse = kind == _GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in extension)
        if kind == _GNU_SPARSE:
            data_offset = _skip_sparse_map(file, header, data_offset)
        if "size" in extension and kind not in _WITHOUT_DATA:
            size = _parse_decimal(extension["size"], start)
        name = extension.get("path", name).partition(b"\0")[0]
        if data_offset + size > length:
            text = f"the file ends after {max(0, length - data_offset)} of the {size} bytes of {_decode(name)!r}"
            raise TarError(text, start)
        if kind != _GNU_LABEL:
            word = OTHER if sparse else _KINDS.get(kind, OTHER)
            if word == FILE and name.endswith(b"/"):
                word = FOLDER  # as V7 archives have it
            member = Member(_decode(name), word, start, data_offset, size)
            yield member
        position = data_offset + size + -size % BLOCK_BYTES
        start, extension = None, {}


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _parse_header(header: bytes, position: int) -> tuple[bytes, int, bytes]:
    """Return the type, the size of the data in bytes, and the name."""
    if len(header) < BLOCK_BYTES:
        raise TarError(f"the header has {len(header)} of {BLOCK_BYTES} bytes", position)
    stored = _parse_number(header[148:156])
    checked = header[:148] + header[156:]
    computed = sum(checked) + _EMPTY_CHECKSUM
    # Some old writers summed signed bytes.
    if stored != computed and stored != computed - 256 * sum(byte > 127 for byte in checked):
        raise TarError("the header is damaged: its checksum does not match", position)
    size = _parse_number(header[124:136])
    if size is None or size < 0:
        raise TarError("the header is damaged: its size cannot be read", position)
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return header[156:157], size, name


def _parse_number(field: bytes) -> int | None:
    """Octal digits, or a number of base 256 when the first bit is set (GNU)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _parse_decimal(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarError("the PAX header is damaged: its size cannot be read", position)
    return int(text)


def _read_extension(file: BinaryIO, offset: int, size: int, length: int, position: int) -> bytes:
    if size > MAX_EXTENSION_BYTES:
        raise TarError(f"a header of {size} bytes for a name, at most {MAX_EXTENSION_BYTES} are read", position)
    if offset + size > length:
        raise TarError("the file ends in a header", position)
    return _read_at(file, offset, size)


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


def _skip_sparse_map(file: BinaryIO, header: bytes, data_offset: int) -> int:
    """Where the data of a GNU sparse file starts: after the blocks that go on with the map of its holes."""
    more = header[482:483].strip(b"\0")
    while more:
        more = _read_at(file, data_offset + 504, 1).strip(b"\0")
        data_offset += BLOCK_BYTES
    return data_offset


def _decode(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
