"""The shard format: bytes that the ecosystem reads, random access, and damage that is noticed and named."""

import errno
import io
import json
import os
import re
import shutil
import tarfile
import threading

import numpy as np
import pytest

from data_tools.errors import UserError
from data_tools.shards import Manifest, Selection, ShardError, ShardInfo, ShardReader, write_shard
from data_tools.tar import TarError, parse_members, render_member, split_name, walk_members


def make_fields(number: int) -> dict[str, bytes]:
    return {"jpg": bytes([number]) * (number * 100), "txt": f"caption {number}".encode(), "json": b'{"captions": []}'}


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 0 and 3 samples, with sample i's key ending in i."""
    shards = []
    number = 0
    for shard, samples in enumerate((4, 0, 3)):
        with write_shard(tmp_path, f"{shard:05d}.tar") as writer:
            for _ in range(samples):
                writer.add(f"{shard:05d}{number:04d}", make_fields(number))
                number += 1
        shards.append(writer.info)
    Manifest.of_shards(tmp_path, shards, build="b", failures=2, captions=7, options={"seed": None}).write()
    return tmp_path


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 70_000])
def test_a_member_is_what_tarfile_writes(size):
    data = os.urandom(size)
    entry = tarfile.TarInfo("000000001.jpg")
    entry.size, entry.mode = size, 0o644
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(entry, io.BytesIO(data))
    rendered = render_member("000000001.jpg", data)
    assert rendered == stream.getvalue()[: len(rendered)]
    assert parse_members(rendered) == {"000000001.jpg": data}


def test_a_member_that_does_not_fit_is_refused():
    assert parse_members(render_member("a" * 100, b"x")) == {"a" * 100: b"x"}
    for name in ("", "a" * 101, "ä.jpg"):
        with pytest.raises(ValueError, match="1 to 100 ASCII characters"):
            render_member(name, b"x")


def test_every_flipped_bit_of_a_header_is_noticed():
    whole = render_member("000000001.txt", b"caption")
    for position in range(512):
        damaged = bytearray(whole)
        damaged[position] ^= 0x04
        with pytest.raises(TarError):
            parse_members(bytes(damaged))


def test_shards_are_read_by_tarfile_and_webdataset(folder):
    with tarfile.open(folder / "00000.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:3]] == ["000000000.jpg", "000000000.txt", "000000000.json"]
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
            (0, 0, 0, "", 0o644)
        }
        assert archive.extractfile("000000002.jpg").read() == make_fields(2)["jpg"]
    webdataset = pytest.importorskip("webdataset")
    urls = [str(folder / f"{shard:05d}.tar") for shard in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{int(n > 3) * 2:05d}{n:04d}" for n in range(7)]
    assert [{part: sample[part] for part in ("jpg", "txt", "json")} for sample in samples] == [
        make_fields(number) for number in range(7)
    ]


def test_the_index_points_at_each_sample_and_its_end(folder):
    offsets = np.fromfile(folder / "00000.tar.idx", dtype="<u8")
    with tarfile.open(folder / "00000.tar") as archive:
        starts = [member.offset for member in archive if member.name.endswith(".jpg")]
        assert [*starts, archive.offset] == list(offsets)
    assert list(np.fromfile(folder / "00001.tar.idx", dtype="<u8")) == [0]


def test_names_that_readers_would_take_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ends in .tar"), write_shard(tmp_path, "a.b.tar"):
        pass
    with pytest.raises(ValueError, match="no dot"), write_shard(tmp_path, "a.tar") as writer:
        writer.add("a.b", {"jpg": b""})
    assert os.listdir(tmp_path) == []


def test_the_manifest_is_what_was_written(folder):
    manifest = Manifest.load(folder)
    assert (manifest.samples, manifest.failures, manifest.captions) == (7, 2, 7)
    assert [shard.samples for shard in manifest.shards] == [4, 0, 3]
    assert manifest.bytes == sum(os.path.getsize(folder / shard.name) for shard in manifest.shards)
    assert json.loads((folder / "sizes.json").read_bytes()) == {"00000.tar": 4, "00001.tar": 0, "00002.tar": 3}
    assert json.loads((folder / "manifest.json").read_bytes())["format"] == 1


def test_the_fingerprint_tells_of_the_samples(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with write_shard(other, "00000.tar") as writer:
        writer.add("000000000", make_fields(0))
    first, second = Manifest.load(folder), Manifest.of_shards(other, [writer.info])
    assert first.fingerprint == Manifest.of_shards("elsewhere", first.shards).fingerprint != second.fingerprint


def test_any_sample_is_read_in_any_order(folder):
    reader = ShardReader(Manifest.load(folder), max_open_shards=1)
    assert len(reader) == 7
    for number in (6, 0, 3, 4, 5, 1, 2):
        sample = reader.read(number)
        assert sample.fields == make_fields(number)
        assert (sample.shard, sample.key[-4:]) == ("00000.tar" if number < 4 else "00002.tar", f"{number:04d}")
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            reader.read(outside)
    reader.close()
    assert reader.read(2).fields == make_fields(2)


def test_threads_share_a_reader_whose_files_come_and_go(folder):
    reader = ShardReader(Manifest.load(folder), max_open_shards=1)
    wrong = []

    def read_many(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 7, 1000):
            if reader.read(int(number)).fields != make_fields(number):
                wrong.append(number)

    threads = [threading.Thread(target=read_many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []
    assert not [link for link in map(read_link, os.listdir("/proc/self/fd")) if link.startswith(str(folder))]


def read_link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_a_damaged_header_is_an_error_that_names_the_sample(folder):
    manifest = Manifest.load(folder)
    start = int(np.fromfile(folder / "00000.tar.idx", dtype="<u8")[2])
    flip(folder / "00000.tar", start + 3)
    reader = ShardReader(manifest)
    with pytest.raises(
        ShardError, match=rf"00000\.tar: sample 2 of 4, bytes {start} to \d+: at byte {start} .*damaged"
    ):
        reader.read(2)
    assert reader.read(1).fields == make_fields(1)


def test_a_shard_that_shrank_is_an_error(folder):
    manifest = Manifest.load(folder)
    os.truncate(folder / "00002.tar", 2000)
    with pytest.raises(ShardError, match=r"00002\.tar: sample 0 of 3, bytes 0 to \d+: the file ends after 2000 of"):
        ShardReader(manifest).read(4)


@pytest.mark.parametrize("name", ["00002.tar", "00002.tar.idx"])
def test_a_shard_that_vanished_is_an_error_of_its_samples(folder, name):
    reader = ShardReader(Manifest.load(folder))
    os.remove(folder / name)
    with pytest.raises(ShardError, match=r"00002\.tar: this shard, or its index, is not readable: .*No such file"):
        reader.read(4)
    assert reader.read_selected(0, 3).key == "000000003"


def test_a_shard_whose_disk_fails_is_an_error_until_it_can_be_read_again(folder, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    reader = ShardReader(Manifest.load(folder))
    assert reader.read(0).key == "000000000"
    files = set(reader._open_shards.values())
    with monkeypatch.context() as patched:
        patched.setattr("data_tools.files.os.pread", fail)
        with pytest.raises(ShardError, match=r"00000\.tar: this shard, .*Stale file handle"):
            reader.read(1)
    assert reader.read(1).key == "000000001"
    assert not files & set(reader._open_shards.values())


def test_an_index_of_another_tar_is_an_error(folder):
    manifest = Manifest.load(folder)
    np.array([0, 512, 9, 40, 50], dtype="<u8").tofile(folder / "00000.tar.idx")
    with pytest.raises(ShardError, match="not the offsets of 4 samples"):
        ShardReader(manifest).read(0)


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def edit(folder, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json: is it a finished build?"),
        (lambda folder: (folder / "manifest.json").write_text('{"form'), "manifest.json: not readable as JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "format None. This version reads format 1"),
        (lambda folder: edit(folder, format=2), "format 2. This version reads format 1"),
        (lambda folder: edit(folder, shards=[{"name": "a.tar"}]), "entries are missing or contradict each other"),
        (lambda folder: edit(folder, samples=8), "entries are missing or contradict each other"),
        (lambda folder: edit(folder, shards=[], samples=0), "does not list (such as 00000.tar, 3 in all)"),
        (lambda folder: (folder / "00000.tar").unlink(), "00000.tar: this shard is missing"),
        (lambda folder: os.truncate(folder / "00000.tar", 9), "00000.tar: 9 bytes, the manifest says"),
        (lambda folder: (folder / "00002.tar.idx").unlink(), "00002.tar.idx: this index is missing"),
        (
            lambda folder: os.truncate(folder / "00002.tar.idx", 24),
            "00002.tar.idx: not the index that the manifest lists",
        ),
        (
            lambda folder: (folder / "00003.tar").touch(),
            "does not list (such as 00003.tar, 1 in all). They belong to another build",
        ),
    ],
)
def test_a_folder_that_is_not_one_whole_build_is_refused(folder, damage, text):
    damage(folder)
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        Manifest.load(folder)
    assert "\n" not in str(caught.value)


def test_an_index_of_other_content_is_refused_when_it_is_first_read(folder):
    """Not at load: with 100,000 shards that would read gigabytes before the first sample."""
    flip(folder / "00002.tar.idx", 8)
    manifest = Manifest.load(folder)
    assert list(manifest.load_index(0)) == list(np.fromfile(folder / "00000.tar.idx", dtype="<u8"))
    for read in (lambda: manifest.load_index(2), lambda: ShardReader(manifest).read(6)):
        with pytest.raises(ShardError, match=r"00002.tar.idx: not the index that the manifest lists"):
            read()


def test_thousands_of_shards_are_opened_without_reading_one(tmp_path):
    """Tars and indexes here are holes of the right sizes: whoever reads one finds that it is not the manifest's."""
    infos = [ShardInfo(f"{number:06d}.tar", 10_000, 2**30, "0" * 64, "0" * 64) for number in range(2000)]
    data, view = tmp_path / "data", tmp_path / "view"
    data.mkdir()
    for info in infos:
        for name, size in ((info.name, info.bytes), (info.name + ".idx", 80_008)):
            (data / name).touch()
            os.truncate(data / name, size)
    Manifest.of_shards(data, infos).write()
    manifest = Manifest.load(data)
    assert (manifest.samples, len(manifest.shards), manifest.counts.sum()) == (20_000_000, 2000, 20_000_000)
    with pytest.raises(ShardError, match=r"001999.tar.idx: these are not the offsets of 10000 samples"):
        ShardReader(manifest).read(19_999_999)
    manifest.write_view(view, Selection.of_all(np.full(2000, 10_000)).without({7: np.arange(9999)}), 1, {})
    assert list(Manifest.load(view).counts[6:9]) == [10_000, 1, 10_000]
    os.truncate(data / "001234.tar.idx", 80_000)
    with pytest.raises(UserError, match=r"001234.tar.idx: not the index that the manifest lists"):
        Manifest.load(view)


def test_no_folder_and_no_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Manifest.load(tmp_path / "none")
    Manifest.of_shards(tmp_path, []).write()
    with pytest.raises(UserError, match="holds no samples"):
        Manifest.load(tmp_path)


def test_a_shard_name_in_a_manifest_is_no_path(folder):
    entry = {"name": "../00000.tar", "samples": 7, "bytes": 1, "sha256": "", "index_sha256": ""}
    edit(folder, shards=[entry])
    with pytest.raises(UserError, match="contradict"):
        Manifest.load(folder)


# Views, quarantine, tars of others, and folders behind URLs


def keys_of(manifest: Manifest) -> list[str]:
    reader = ShardReader(manifest)
    return [reader.read(number).key for number in range(len(reader))]


def test_a_view_selects_samples_without_touching_the_tars(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("views") / "view"
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    manifest = Manifest.load(folder)
    manifest.write_view(out, Selection.of_masks([[1, 0, 1, 0], [], [0, 0, 1]]), 3, {"where": "..."})
    view = Manifest.load(out)
    assert (view.samples, view.captions, list(view.counts)) == (3, 3, [2, 0, 1])
    assert keys_of(view) == ["000000000", "000000002", "000020006"]
    assert view.fingerprint != manifest.fingerprint == Manifest.load(folder).fingerprint
    with pytest.raises(IndexError):
        ShardReader(view).read(3)
    narrower = out.with_name("narrower")
    view.write_view(narrower, Selection.of_masks([[0, 0, 1, 0], [], [0, 0, 0]]), 1, {})
    assert keys_of(Manifest.load(narrower)) == ["000000002"]
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_view_moves_with_its_dataset_and_notices_another(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(folder, home / "data")
    Manifest.load(home / "data").write_view(home / "view", Selection.of_masks([[1, 0, 0, 0], [], [0, 0, 0]]), 1, {})
    moved = home.with_name("moved")
    home.rename(moved)
    assert keys_of(Manifest.load(moved / "view")) == ["000000000"]
    flip(moved / "view" / "selection.bin", 0)
    with pytest.raises(UserError, match=r"selection.bin: not the selection that the view lists"):
        Manifest.load(moved / "view")
    flip(moved / "view" / "selection.bin", 0)
    with write_shard(moved / "data", "00000.tar") as writer:
        writer.add("other", make_fields(0))
    Manifest.of_shards(moved / "data", [writer.info, *Manifest.load(folder).shards[1:]]).write()
    with pytest.raises(UserError, match="is not the dataset that this view was made of"):
        Manifest.load(moved / "view")
    shutil.rmtree(moved / "data")
    with pytest.raises(UserError, match=r"a view of .*data, which is not there"):
        Manifest.load(moved / "view")


def test_quarantined_samples_are_left_out(folder, tmp_path_factory):
    view = tmp_path_factory.mktemp("views") / "view"
    Manifest.load(folder).write_view(view, Selection.of_masks([[1, 1, 0, 0], [], [1, 0, 0]]), 3, {})
    (folder / "quarantine.json").write_text('{"00000.tar": {"1": "damaged"}, "00002.tar": {"0": "x", "2": "y"}}')
    manifest = Manifest.load(folder)
    assert keys_of(manifest) == ["000000000", "000000002", "000000003", "000020005"]
    assert keys_of(Manifest.load(view)) == ["000000000"]
    (folder / "quarantine.json").write_text("{")
    with pytest.raises(UserError, match=r"quarantine.json: not readable"):
        Manifest.load(folder)


@pytest.mark.parametrize("seed", range(3))
def test_selections_count_and_leave_out(seed):
    draw = np.random.default_rng(seed)
    samples = draw.integers(0, 30, 50) * draw.integers(0, 2, 50)
    masks = [draw.random(count) < 0.5 for count in samples]
    selection = Selection.of_masks(masks)
    assert list(selection.counts) == [mask.sum() for mask in masks]
    everything = Selection.of_all(samples)
    assert (everything.bits == Selection.of_masks([np.ones(count) for count in samples]).bits).all()
    assert list(everything.counts) == list(samples)
    taken = {number: np.flatnonzero(~mask) for number, mask in enumerate(masks) if len(mask)}
    assert (everything.without(taken).bits == selection.bits).all()
    assert list(everything.counts) == list(samples)


def write_foreign_tar(path, names_and_data, format=tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("nested")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in names_and_data:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 12.5  # PAX keeps the half second in a header of its own
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_other_writers_are_read(tmp_path, format):
    names = ["nested/a.b.jpg", "nested/a.b.txt", f"nested/{'long' * 12}/{'long' * 20}.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names.append("nested/ünïcode.TXT")
    write_foreign_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], format)
    data = (tmp_path / "a.tar").read_bytes()
    members = list(walk_members(lambda start, end: data[start:end], len(data)))
    assert [member.name for member in members] == names
    for member in members:
        assert data[member.start : member.start + member.size] == member.name.encode()
        assert parse_members(data[member.offset : member.end]) == {member.name: member.name.encode()}
    assert split_name(names[0]) == ("nested/a", "b.jpg")


def test_links_and_cut_archives_are_errors(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("evil.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    data = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(TarError, match="not a regular file"):
        list(walk_members(lambda start, end: data[start:end], len(data)))
    whole = render_member("a.jpg", b"x" * 600)
    with pytest.raises(TarError, match="has 600 bytes of data, but 512 follow"):
        parse_members(whole[:1024])
    with pytest.raises(TarError):
        parse_members(whole + bytes(512))  # an end block inside a sample


def test_a_dataset_behind_a_url_is_the_same(folder):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in os.listdir(folder):
        memory.pipe_file(f"/remote/set/{name}", (folder / name).read_bytes())
    try:
        manifest = Manifest.load("memory://remote/set")
        assert manifest.fingerprint == Manifest.load(folder).fingerprint
        assert keys_of(manifest) == keys_of(Manifest.load(folder))
        with write_shard("memory://remote/other", "00000.tar") as writer:
            writer.add("000000000", make_fields(0))
        Manifest.of_shards("memory://remote/other", [writer.info]).write()
        assert keys_of(Manifest.load("memory://remote/other")) == ["000000000"]
        assert not [name for name in memory.ls("/remote/other", detail=False) if name.endswith(".tmp")]
        with pytest.raises(UserError, match="no such folder"):
            Manifest.load("memory://remote/none")
    finally:
        memory.rm("/remote", recursive=True)
