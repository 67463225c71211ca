"""What the footer of a parquet file says about its column chunks: where they lie, how large they are, how many nulls.

pyarrow ends the whole process ("terminate called after ...") when it is asked for these facts of a damaged footer, while
its reading of the columns raises errors as it should. So the facts are read here.
Source: Apache Parquet's parquet.thrift, and Thrift's compact protocol.
"""

import struct
from typing import Any, BinaryIO, NamedTuple

_TAIL_BYTES = 8
_MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


class FooterError(ValueError):
    """A footer that is damaged or not there."""


class Chunk(NamedTuple):
    """One column of one row group. `start` and `stored_bytes` say where its pages lie; `nulls` is None if not told."""

    start: int
    stored_bytes: int
    unpacked_bytes: int
    nulls: int | None


class RowGroup(NamedTuple):
    """The rows of a group, and its columns by their path, such as `image.bytes`."""

    rows: int
    chunks: dict[str, Chunk]


class Footer(NamedTuple):
    """The row groups, and the bytes that said so."""

    row_groups: list[RowGroup]
    data: bytes


def read_footer(stream: BinaryIO) -> Footer:
    """Read the footer of the parquet file in `stream`. Raises FooterError."""
    length = stream.seek(0, 2)
    stream.seek(max(0, length - _TAIL_BYTES))
    tail = stream.read(_TAIL_BYTES)
    size = int.from_bytes(tail[:4], "little")
    if len(tail) < _TAIL_BYTES or tail[4:] != _MAGIC or size + _TAIL_BYTES > length:
        raise FooterError("the footer is missing")
    stream.seek(length - _TAIL_BYTES - size)
    data = stream.read(size)
    try:
        groups = [_make_group(group, length) for group in _Reader(data).read_struct().get(4, [])]
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, RecursionError, struct.error):
        raise FooterError("the footer is damaged") from None
    return Footer(groups, data)


def _make_group(group: dict[int, Any], length: int) -> RowGroup:
    chunks = {}
    for column in group[1]:
        meta = column[3]
        starts = [start for start in (meta.get(11), meta[9]) if start]
        start, stored = min(starts, default=0), meta[7]
        if min(start, stored, meta[6]) < 0 or start + stored > length:
            raise ValueError
        path = b".".join(meta[3]).decode(errors="backslashreplace")
        chunks[path] = Chunk(start, stored, meta[6], meta.get(12, {}).get(3))
    return RowGroup(int(group[3]), chunks)


class _Reader:
    """Reads values of Thrift's compact protocol; structs become {number of the field: value}."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def read_struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._read_byte():
            number = number + (header >> 4) if header >> 4 else self._read_integer()
            kind = header & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._read_value(kind)
        return fields

    def _read_value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._read_byte()
        if kind in _INTEGERS:
            return self._read_integer()
        if kind == _DOUBLE:
            return struct.unpack("<d", self._read_bytes(8))[0]
        if kind == _BINARY:
            return self._read_bytes(self._read_varint())
        if kind in _LISTS:
            header = self._read_byte()
            count = header >> 4 if header >> 4 < 15 else self._read_varint()
            return [self._read_value(header & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._read_varint()
            kinds = self._read_byte() if count else 0
            return [(self._read_value(kinds >> 4), self._read_value(kinds & 15)) for _ in range(count)]
        if kind == _STRUCT:
            return self.read_struct()
        raise ValueError(f"no such type: {kind}")

    def _read_byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _read_bytes(self, count: int) -> bytes:
        data = self._data[self._place : self._place + count]
        if len(data) < count:
            raise ValueError("the data end too early")
        self._place += count
        return data

    def _read_varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 10 bytes")

    def _read_integer(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)
