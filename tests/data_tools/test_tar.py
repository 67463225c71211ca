"""Headers of tars as others write them, and of tars that nobody should have written; Python's tarfile is the oracle."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tar import (
    ARCHIVE_END,
    MAX_EXTENSION_BYTES,
    Member,
    TarError,
    parse_members,
    read_headers,
    render_member,
    walk_members,
)

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device",
}
# A name does not end in a slash: tarfile takes some files of such a name for folders, depending on the format.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150).filter(
    lambda name: not name.endswith("/")
)
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from(list(KINDS)), st.integers(0, 1500)), max_size=6)


def write_tar(members, tar_format) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number, (name, kind, size) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size if kind == tarfile.REGTYPE else 0
            info.linkname = "../" * 60 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            if tar_format == tarfile.PAX_FORMAT and number % 2:
                info.pax_headers = {"comment": "a = b\nc"}
            try:
                tar.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
            except ValueError:  # a name that does not fit this format
                assert tar_format == tarfile.USTAR_FORMAT
    return buffer.getvalue()


def read_members(data: bytes, walk=read_headers, is_part: bool = False):
    return walk(lambda start, end: data[start:end], len(data), is_part)


def read(data: bytes) -> list[Member]:
    return list(read_members(data))


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS))
def test_names_kinds_and_places_are_those_of_tarfile(members, tar_format):
    data = write_tar(members, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        expected = [
            (info.name, KINDS[info.type], info.offset, info.offset_data, info.size) for info in tar.getmembers()
        ]
    found = read(data)
    # tarfile takes slashes off the end of a folder's name
    assert [(name.rstrip("/"), *rest) for name, *rest in found] == expected


@settings(max_examples=300, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_end_in_a_tar_error_or_in_members_inside_the_file(members, tar_format, data):
    tar = bytearray(write_tar(members, tar_format))
    for _ in range(data.draw(st.integers(1, 8))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    tar = tar[: data.draw(st.integers(0, len(tar)))]
    end = 0
    try:
        for member in read_members(bytes(tar)):
            assert end <= member.offset < member.start <= member.start + member.size <= len(tar)
            end = member.end
    except TarError as error:
        assert error.text and 0 <= error.offset <= len(tar)


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS))
def test_a_walk_gives_the_files_and_stops_at_what_has_no_place_in_a_shard(members, tar_format):
    data = write_tar(members, tar_format)
    found = read(data)
    wrong = next((member for member in found if member.kind not in ("file", "folder")), None)
    walked, walk = [], read_members(data, walk_members)
    try:
        while True:
            walked.append(next(walk))
    except StopIteration as stop:
        assert wrong is None
        assert not data[stop.value :].strip(b"\0") and stop.value == (found[-1].end if found else 0)
    except TarError as error:
        assert wrong is not None and error.offset == wrong.offset
        assert "is not a regular file" in error.text and wrong.kind in error.text
    until = len(found) if wrong is None else found.index(wrong)
    assert walked == [member for member in found[:until] if member.kind == "file"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=700)), max_size=4), st.sampled_from(FORMATS))
def test_members_of_a_part_of_an_archive_have_the_bytes_of_tarfile(members, tar_format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:
                assert tar_format == tarfile.USTAR_FORMAT
        end = tar.offset
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        infos = [info for info in tar if info.isfile()]
        contents = [tar.extractfile(info).read() for info in infos]
    if any(name.endswith("/") for name, _ in members) or len({info.name for info in infos}) < len(infos):
        return
    assert list(parse_members(data[:end]).values()) == contents
    with pytest.raises(TarError, match="checksum"):
        parse_members(data[:end] + bytes(512))


def test_a_global_pax_header_belongs_to_no_member():
    buffer = io.BytesIO()
    headers = {"path": "other", "size": "3", "comment": "made by git"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name in ("a.jpg", "ü.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    data = buffer.getvalue()
    assert [(m.name, m.offset, m.start, m.size) for m in read(data)] == [
        ("a.jpg", 1024, 1536, 600),
        ("ü.jpg", 2560, 4096, 600),
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(info.offset, info.offset_data) for info in tar] == [(m.offset, m.start) for m in read(data)]


def test_archives_of_v7_are_read():
    header = bytearray(render_member("a.jpg", b"")[:512])
    header[156:157], header[257:265] = b"\0", bytes(8)
    header[124:136] = b"%11o " % 3
    header[148:156] = b"%6o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    data = bytes(header) + b"abc" + bytes(509)
    assert [(m.name, m.kind, m.size) for m in read(data)] == [("a.jpg", "file", 3)]
    assert parse_members(data) == {"a.jpg": b"abc"}


HEADER_FIELDS = {"size": (124, 12), "type": (156, 1), "magic": (257, 8), "name": (0, 100), "prefix": (345, 155)}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(HEADER_FIELDS)), st.binary(max_size=12)), max_size=4),
    st.binary(max_size=1200),
)
def test_lies_under_a_right_checksum_end_in_a_tar_error_or_in_members_inside_the_file(lies, rest):
    header = bytearray(render_member("a.jpg", b""))
    for field, value in lies:
        start, length = HEADER_FIELDS[field]
        header[start : start + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    tar = bytes(header) + rest
    try:
        for member in read_members(bytes(tar)):
            assert 0 <= member.offset < member.start <= member.start + member.size <= len(tar)
    except TarError as error:
        assert error.text and 0 <= error.offset <= len(tar)


def test_data_is_not_read():
    data = b"".join(render_member(f"{number}.jpg", bytes(100_000)) for number in range(20)) + ARCHIVE_END
    ranges = []

    def read_range(start, end):
        ranges.append(end - start)
        return data[start:end]

    assert [member.size for member in read_headers(read_range, len(data))] == [100_000] * 20
    assert ranges == [512] * 21


def test_sizes_of_base_256_and_of_pax_count():
    header = bytearray(render_member("a.jpg", b"")[:512])
    header[124:136] = b"\x80" + (700).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    after = render_member("b.jpg", b"x")
    assert [(m.name, m.size) for m in read(bytes(header) + bytes(1024) + after)] == [("a.jpg", 700), ("b.jpg", 1)]

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 0, {"size": "600"}
        tar.addfile(info)
    data = buffer.getvalue()[:1536] + bytes(1024) + after
    assert [(m.name, m.size) for m in read(data)] == [("a.jpg", 600), ("b.jpg", 1)]


def test_a_sparse_file_is_of_another_kind_and_what_follows_is_found():
    header = bytearray(render_member("holes", b"")[:512])
    header[156:157], header[257:265], header[482:483] = b"S", b"ustar  \0", b"\1"
    header[124:136] = b"%011o\0" % 600
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    more, last = bytes(504) + b"\1" + bytes(7), bytes(512)
    data = bytes(header) + more + last + bytes(1024) + render_member("b.jpg", b"x") + bytes(1024)
    assert [(m.name, m.kind, m.start) for m in read(data)] == [("holes", "other", 1536), ("b.jpg", "file", 3072)]


def test_names_that_are_not_utf8_or_lead_elsewhere_are_names():
    data = render_member("../../etc/passwd", b"x") + render_member("/etc/x", b"")
    assert [m.name for m in read(data)] == ["../../etc/passwd", "/etc/x"]
    header = bytearray(render_member("caf.jpg", b"")[:512])
    header[3:7] = b"\xe9.jp"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    assert [m.name for m in read(bytes(header))] == ["caf\\xe9.jp"]


def damage(name: str, change) -> bytes:
    header = bytearray(render_member(name, b"abc"))
    change(header)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    return bytes(header)


def set_type(kind: bytes, size: int = 3):
    def change(header):
        header[156:157], header[124:136] = kind, b"%011o\0" % size

    return change


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "the header has 26 of 512 bytes"),
        (b"x" * 1024, "checksum"),
        (render_member("a.jpg", bytes(2000))[:1500], "member 'a.jpg' has 2000 bytes of data, but 988 follow"),
        (damage("a", set_type(b"L", MAX_EXTENSION_BYTES + 1)), "a header of 1048577 bytes for a name"),
        (damage("a", set_type(b"x")), "the PAX header is damaged"),
        (damage("a", set_type(b"L")), "the archive ends after a header that belongs to another"),
        (damage("a", set_type(b"L", 5000)), "the file ends in a header"),
    ],
)
def test_what_is_no_whole_tar_is_refused(data, text):
    with pytest.raises(TarError) as caught:
        read(data)
    assert text in caught.value.text


def test_a_pax_header_of_many_records_is_read_in_linear_time():
    records = b"6 a=b\n" * 150_000
    assert len(read(damage_pax(records) + render_member("a.jpg", b""))) == 1


def damage_pax(records: bytes) -> bytes:
    return damage("pax", set_type(b"x", len(records)))[:512] + records + bytes(-len(records) % 512)
