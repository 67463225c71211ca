"""Tars of others: indexes as Energon writes them, grouping as webdataset does it, and a loader that reads the result."""

import io
import json
import os
import re
import tarfile
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.index import index_tars
from data_tools.shards import Manifest, ShardReader

SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
META = re.compile(r"__[^/]*__($|/)")


def index_by_tarfile(path) -> bytes:
    """What Energon 7 writes: its loop over tarfile's members, in our words."""
    offsets, last = [], None
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            match = SPLIT.match(member.name)
            if not member.isreg() or META.match(member.name) or match is None:
                continue
            if match.group(1) != last:
                offsets.append(member.offset)
                last = match.group(1)
        offsets.append(archive.offset)
    return np.array(offsets, dtype="<u8").tobytes()


def picture(noise, seed: int = 0, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    noise(40, 30, seed).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT, pax_headers=None) -> None:
    """`members` are (name, bytes), (name, None) for a folder."""
    with tarfile.open(path, "w", format=format, pax_headers=pax_headers) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.mtime = 12.5 if format == tarfile.PAX_FORMAT else 12
            if data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data or b""))


@pytest.fixture
def write_webdataset(tmp_path, noise):
    """Tars by webdataset's own writer, which writes a PAX header before each member; keys begin anew in each tar."""
    import webdataset

    def write(folder: str = "tars", shards: int = 2, samples: int = 5):
        (tmp_path / folder).mkdir()
        for shard in range(shards):
            with webdataset.TarWriter(str(tmp_path / folder / f"{shard:05d}.tar")) as writer:
                for number in range(samples):
                    name, kind = [("jpg", "JPEG"), ("png", "PNG")][number % 2]
                    sample = {"__key__": f"{number:09d}", name: picture(noise, shard * 100 + number, kind)}
                    if number % 3:
                        sample["txt"] = f"caption {shard} {number}"
                    else:
                        sample["json"] = {"caption": f"caption {shard} {number}", "original_width": 640, "url": "u"}
                    writer.write(sample | {"cls": number, "seg.mask": b"x"})
        return tmp_path / folder

    return write


def test_the_tars_of_webdataset_become_a_dataset(write_webdataset, capsys):
    tars = write_webdataset()
    before = {name: (tars / name).read_bytes() for name in os.listdir(tars)}
    index_tars([str(tars)], processes=2)
    assert "10 samples" in capsys.readouterr().out
    for name, content in before.items():
        assert (tars / name).read_bytes() == content
        assert (tars / f"{name}.idx").read_bytes() == index_by_tarfile(tars / name)
    assert json.loads((tars / "sizes.json").read_text()) == {"00000.tar": 5, "00001.tar": 5}
    manifest = Manifest.load(tars)
    reader = ShardReader(manifest)
    assert [reader.read(number).key for number in range(10)] == [f"{number:09d}" for number in range(5)] * 2
    assert set(reader.read(1).fields) == {"png", "txt", "cls", "seg.mask"}
    assert reader.read(6).fields["txt"] == b"caption 1 1"


def test_the_loader_trains_on_tars_of_others(write_webdataset):
    torch = pytest.importorskip("torch")
    from pretrain.data.loader import DataConfig, Loader
    from pretrain.world import World

    tars = write_webdataset()
    index_tars([str(tars)], prefix_keys=True, processes=1)

    class Tokenizer:
        context_length = 4

        def __call__(self, captions: list[str]):
            seen.extend(captions)
            return torch.zeros(len(captions), 4, dtype=torch.int64), torch.ones(len(captions), 4, dtype=torch.bool)

    seen: list[str] = []
    world = World(rank=0, size=1, device=torch.device("cpu"))
    loader = Loader(
        DataConfig(path=str(tars), threads=0), Tokenizer(), image_size=16, global_batch=10, seed=0, world=world
    )
    batch = next(iter(loader))
    assert sorted(batch.keys) == sorted(f"{shard:05d}_{number:09d}" for shard in range(2) for number in range(5))
    assert sorted(seen[:10]) == sorted(f"caption {shard} {number}" for shard in range(2) for number in range(5))
    assert batch.image.shape == (10, 3, 16, 16)
    assert loader.measure()["data/skipped"] == 0


def test_duplicate_keys_are_counted_and_a_prefix_makes_them_unique(write_webdataset, capsys):
    tars = write_webdataset(shards=3)
    index_tars([str(tars)], processes=1, as_json=True)
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["duplicate_keys"], facts["duplicate_key"]) == (10, "000000000")
    assert "10 samples have the key of another (such as 000000000)" in captured.err
    index_tars([str(tars)], prefix_keys=True, sidecars=True, processes=1, as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["duplicate_keys"] == 0 and captured.err == ""
    manifest = Manifest.load(tars)
    reader = ShardReader(manifest)
    assert [reader.read(number).key for number in (0, 14)] == ["00000_000000000", "00002_000000004"]
    assert manifest.read_sidecar(2, ["key"]).column("key").to_pylist()[4] == "00002_000000004"


def test_one_key_twice_in_a_tar_is_told(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("b.jpg", b""), ("a.jpg", b""), ("c.jpg", b""), ("c.JPG", b"")])
    facts = {}
    for prefix in (False, True):
        index_tars([str(tmp_path)], prefix_keys=prefix, processes=1, as_json=True)
        captured = capsys.readouterr()
        facts = json.loads(captured.out)
        assert (facts["samples"], facts["duplicate_keys"]) == (4, 1)
        os.remove(tmp_path / "a.tar.idx")
    assert facts["duplicate_key"] == "a_a"
    assert facts["repeated_members"] == 1
    assert "two files of one extension" in captured.err


NAMES = ["k{}.jpg", "k{}.txt", "K{}.a.b.json", "d.e/k{}.jpg", ".hidden{}", "README{}", "__meta{}__", "__m{}__/x.jpg"]
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "d/.k{}.jpg", "folder{}", "käse{}.jpg", "x" * 120 + "{}.jpg"]), st.integers(0, 3)
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(MEMBERS, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.booleans(), st.booleans())
def test_any_tar_gets_energons_index(tmp_path_factory, members, format, has_global_header, has_end):
    folder = tmp_path_factory.mktemp("tars")
    content = [(name.format(n), None if name.startswith("folder") else b"x" * (n * 300)) for name, n in members]
    with_header = has_global_header and format == tarfile.PAX_FORMAT and content  # tarfile reads no header of nothing
    headers = {"comment": "of all"} if with_header else None
    write_tar(folder / "a.b.tar", content, format, headers)
    wanted = index_by_tarfile(folder / "a.b.tar")
    end = int.from_bytes(wanted[-8:], "little")
    if not has_end:
        os.truncate(folder / "a.b.tar", end)
    if len(wanted) == 8:
        is_empty = os.path.getsize(folder / "a.b.tar") == 0
        with pytest.raises(UserError, match="the file is empty" if is_empty else "not one sample"):
            index_tars([str(folder)], processes=1)
        return
    manifest = index_tars([str(folder)], processes=1)
    assert (folder / "a.b.tar.idx").read_bytes() == wanted
    keys = []
    for name, _ in content:
        match = SPLIT.match(name)
        if match and not META.match(name) and not name.startswith("folder") and keys[-1:] != [match.group(1)]:
            keys.append(match.group(1))
    assert manifest.samples == len(keys)
    reader = ShardReader(manifest)
    for number, key in enumerate(keys):
        try:
            assert reader.read(number).key == key
        except UserError as error:
            assert "is there twice" in str(error)


def test_an_index_that_fits_is_kept_and_another_is_made_again(write_webdataset, capsys):
    tars = write_webdataset()
    wanted = {name: index_by_tarfile(tars / name) for name in ("00000.tar", "00001.tar")}
    (tars / "00000.tar.idx").write_bytes(wanted["00000.tar"])
    kept = os.stat(tars / "00000.tar.idx")
    offsets = np.frombuffer(wanted["00001.tar"], "<u8")

    def run(other: bytes) -> int:
        (tars / "00001.tar.idx").write_bytes(other)
        index_tars([str(tars)], processes=1, as_json=True)
        assert (tars / "00001.tar.idx").read_bytes() == wanted["00001.tar"]
        return json.loads(capsys.readouterr().out)["reused_indexes"]

    assert run(wanted["00001.tar"]) == 2
    for wrong in (
        b"",
        b"\0" * 7,
        offsets[:-1].tobytes(),
        offsets[::-1].tobytes(),
        (offsets + 512).astype("<u8").tobytes(),
    ):
        assert run(wrong) == 1
    moved = offsets.copy()
    moved[2] += 1024  # the second header of the same sample's first file
    assert run(moved.tobytes()) == 1
    assert os.stat(tars / "00000.tar.idx") == kept or os.stat(tars / "00000.tar.idx").st_mtime_ns == kept.st_mtime_ns
    later = time.time() + 60
    os.utime(tars / "00000.tar", (later, later))
    assert run(wanted["00001.tar"]) == 1


def test_indexes_may_lie_elsewhere(write_webdataset, tmp_path, monkeypatch):
    tars = write_webdataset()
    before = sorted(os.listdir(tars))
    monkeypatch.chdir(tmp_path)
    index_tars(["tars/{00000..00001}.tar"], "out/index", sidecars=True, hash=True, processes=1)
    assert sorted(os.listdir(tars)) == before
    manifest = Manifest.load("out/index")
    assert ShardReader(manifest).read(7).fields["txt"] == b"caption 1 2"
    (tmp_path / "out").rename(tmp_path / "tars" / "moved")
    with pytest.raises(UserError):
        Manifest.load("tars/moved/index")  # the way to the tars is relative, and no longer right
    (tmp_path / "tars" / "moved").rename(tmp_path / "again")
    assert Manifest.load("again/index").samples == 10
    index_tars(["tars/00001.tar"], "one", processes=1)
    assert Manifest.load("one").samples == 5


def test_sidecars_tell_what_the_samples_are(write_webdataset, tmp_path, noise):
    tars = write_webdataset(shards=1, samples=4)
    strange = [("bad.jpg", b"no picture"), ("bad.txt", b"\xff"), ("none.json", b'["list"]')]
    write_tar(tars / "00001.tar", [*strange, ("c.jpeg", picture(noise)), ("c.json", b'{"captions": ["a", "b"]}')])
    manifest = index_tars([str(tars)], sidecars=True, processes=1)
    rows = manifest.read_sidecar(0).to_pylist()
    assert [(row["width"], row["height"], row["status"], row["error"]) for row in rows] == [
        (40, 30, "success", None)
    ] * 4
    assert [row["captions"] for row in rows] == [[f"caption 0 {number}"] for number in range(4)]
    assert [(row["original_width"], row["source"]) for row in rows[:2]] == [(640, "u"), (40, None)]
    offsets = manifest.load_index(0)
    assert [row["offset"] for row in rows] == list(offsets[:-1])
    bad, none, good = manifest.read_sidecar(1).to_pylist()
    assert "unreadable caption" in bad["error"] and "not a picture" in bad["error"] and bad["width"] is None
    assert none["error"] == "no caption; no picture: its files are json"
    assert (good["captions"], good["caption"], good["error"]) == (["a", "b"], "a", None)
    assert manifest.captions == 4 + 2


def test_the_sidecar_of_img2dataset_is_kept_and_read(write_webdataset):
    tars = write_webdataset(shards=1, samples=3)
    rows = {
        "url": ["u0", "x", "u1", "u2"],
        "caption": ["one", "failed", "two", "three"],
        "key": ["000000000", "000000009", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success", "success"],
        "error_message": [None, "404", None, None],
        "width": [40, None, 40, 40],
        "height": [30, None, 30, 30],
        "sha256": ["00", None, "00", "00"],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tars / "00000.parquet")
    before = (tars / "00000.parquet").read_bytes()
    manifest = index_tars([str(tars)], sidecars=True, processes=1)
    assert (tars / "00000.parquet").read_bytes() == before
    assert manifest.read_sidecar(0, ["key", "captions"]).to_pylist() == [
        {"key": f"{number:09d}", "captions": [caption]} for number, caption in enumerate(("one", "two", "three"))
    ]
    assert manifest.read_sidecar(0, failures=True).column("url").to_pylist() == ["u0", "x", "u1", "u2"]
    elsewhere = index_tars([str(tars)], str(tars.parent / "out"), processes=1)
    assert elsewhere.read_sidecar(0, ["caption"]).num_rows == 3
    rows["status"][0] = "failed_to_resize"
    pyarrow.parquet.write_table(pyarrow.table(rows), tars / "00000.parquet")
    with pytest.raises(UserError, match=r"00000.parquet: tells of 2 samples, the tar holds 3"):
        index_tars([str(tars)], sidecars=True, processes=1)


def test_tars_that_cannot_be_trusted_are_named_with_the_byte(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 600), ("b.jpg", b"y" * 600)], tarfile.USTAR_FORMAT)
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    damaged = bytearray(whole)
    damaged[1536 + 3] ^= 1
    cases = [
        (bytes(damaged), r"a\.tar: at byte 1536 the header is damaged: its checksum does not match"),
        (bytes(whole[:2300]), r"a\.tar: at byte 1536 member 'b.jpg' has 600 bytes of data"),
        (bytes(whole[:2700]), r"the archive ends at byte 2700, in the padding"),
        (b"\x1f\x8b" + bytes(1000), r"a\.tar: at byte 0 the header is damaged"),
    ]
    for content, text in cases:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=text) as caught:
            index_tars([str(tmp_path)], processes=1)
        assert "\n" not in str(caught.value)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("a.jpg"))
            member = tarfile.TarInfo("b.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(UserError, match=r"a\.tar: at byte 512 member 'b.jpg' is not a regular file"):
            index_tars([str(tmp_path)], processes=1)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_what_cannot_be_indexed_is_refused(write_webdataset, tmp_path):
    tars = write_webdataset()
    (tmp_path / "other").mkdir()
    os.link(tars / "00000.tar", tmp_path / "other" / "b.tar")
    cases = [
        ([tars / "{00000..00002}.tar"], r"00002.tar: no such tar"),
        ([tars / "00000.tar"], r"holds 1 more tars \(such as 00001.tar\)"),
        ([tars, tmp_path / "other"], "tars of several folders"),
        ([tars / "*.tgz"], "no tar of such a name"),
        ([tmp_path / "none"], "no such folder or tar"),
        ([tmp_path], "no tars are in this folder"),
    ]
    for places, text in cases:
        with pytest.raises(UserError, match=text):
            index_tars([str(place) for place in places], processes=1)
    Manifest.of_shards(tmp_path / "other", []).write()
    with pytest.raises(UserError, match="its manifest.json is of build, not of `index`"):
        index_tars([str(tmp_path / "other")], processes=1)


def test_tars_behind_a_url_are_indexed_into_a_folder(write_webdataset, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    tars = write_webdataset()
    memory = fsspec.filesystem("memory")
    for name in os.listdir(tars):
        memory.pipe_file(f"/index-tars/{name}", (tars / name).read_bytes())
    try:
        for pattern in ("memory://index-tars/{00000..00001}.tar", "memory://index-tars/*.tar", "memory://index-tars"):
            manifest = index_tars([pattern], str(tmp_path / "out"), processes=1, sidecars=True)
            assert (tmp_path / "out" / "00001.tar.idx").read_bytes() == index_by_tarfile(tars / "00001.tar")
            assert ShardReader(manifest).read(6).fields["txt"] == b"caption 1 1"
    finally:
        memory.rm("/index-tars", recursive=True)


def test_the_command_tells_what_it_did(write_webdataset, run_data_tools):
    tars = write_webdataset()
    run = run_data_tools("index", tars, "--processes", 1, "--json")
    assert (run.returncode, json.loads(run.stdout)["samples"]) == (0, 10)
    assert "example:\n  python -m data_tools index" in run_data_tools("index", "--help").stdout
