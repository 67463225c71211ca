"""A folder without personal data: what is masked, hidden and removed, what stays byte for byte, and the same bytes always."""

import hashlib
import io
import json
import os
import time

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.faces import CELLS, Box, FaceError, FaceFinder, hide_faces, obscure
from data_tools.info import print_info
from data_tools.privacy import clean_dataset
from data_tools.shards import Manifest, ShardReader

CAPTIONS = [
    ["a dog on a beach of 1920x1080", "dog"],
    ["write to jane@example.com", "a plain caption"],
    ["a plain caption", "call +1 212 555 0123 or jane@example.com"],
    ["@jane_doe at 8.8.8.8", "4111 1111 1111 1111"],
    ["https://instagram.com/jane.doe", "13812345678"],
    ["a cat", "two cats"],
    ["a hat", "a red hat"],
]
MASKED = [
    CAPTIONS[0],
    ["write to [email]", "a plain caption"],
    ["a plain caption", "call [phone] or [email]"],
    ["[handle] at [ip]", "[card]"],
    ["[handle]", "[phone]"],
    CAPTIONS[5],
    CAPTIONS[6],
]


@pytest.fixture
def dataset(tmp_path, noise):
    """Seven samples in shards of three, and a row without a picture whose caption holds an address."""
    images = tmp_path / "images"
    images.mkdir()
    rows = ["filename\tcaption", "none.jpg\tmail bob@example.com"]
    for number, captions in enumerate(CAPTIONS):
        noise(64, 70, number).save(images / f"{number}.jpg", quality=90)
        rows += [f"{number}.jpg\t{caption}" for caption in captions]
    (tmp_path / "table.tsv").write_text("\n".join(rows) + "\n")
    build_shards(tmp_path / "table.tsv", tmp_path / "set", images, samples_per_shard=3, processes=1)
    return tmp_path / "set"


def read_samples(folder):
    manifest = Manifest.load(folder)
    reader = ShardReader(manifest)
    return {sample.key: sample.fields for sample in (reader.read(number) for number in range(len(reader)))}


def read_rows(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def read_report(folder):
    return Manifest.load(folder).options["report"]


def write_boxes(path, boxes):
    names = ("key", "x", "y", "width", "height")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(zip(names, box, strict=True)) for box in boxes]), path)
    return path


def test_masks_stand_in_every_place_of_a_caption(dataset, tmp_path, capsys):
    clean_dataset(dataset, tmp_path / "out", faces="keep", processes=1)
    rows, samples, before = read_rows(tmp_path / "out"), read_samples(tmp_path / "out"), read_samples(dataset)
    assert list(samples) == list(before) == [row["key"] for row in rows if row["status"] == "success"]
    for key, captions in zip(samples, MASKED, strict=True):
        row = next(row for row in rows if row["key"] == key)
        assert json.loads(samples[key]["json"])["captions"] == row["captions"] == captions
        assert samples[key]["txt"].decode() == row["caption"] == captions[0]
        assert samples[key]["jpg"] == before[key]["jpg"]
    unchanged = [key for key in samples if samples[key] == before[key]]
    assert unchanged == [list(samples)[place] for place in (0, 5, 6)]
    failed = rows[0]
    assert (failed["status"], failed["error"], failed["captions"]) == (
        "failure",
        "missing picture: none.jpg",
        ["mail [email]"],
    )
    report = read_report(tmp_path / "out")
    assert report["masked"] == {"email": 3, "phone": 2, "handle": 2, "ip": 1, "card": 1}
    assert "email 3" in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert b"example.com" not in path.read_bytes() and b"jane" not in path.read_bytes(), path.name
    offsets = {row["key"]: (row["offset"], row["size"]) for row in rows}
    tar = (tmp_path / "out" / "00001.tar").read_bytes()
    key = [row["key"] for row in rows if row["key"].startswith("00001")][1]
    assert tar[offsets[key][0] :].startswith(f"{key}.jpg".encode())


def test_drop_takes_the_sample_and_says_why(dataset, tmp_path):
    manifest = clean_dataset(dataset, tmp_path / "out", captions="drop", faces="keep", processes=1)
    assert (manifest.samples, manifest.failures, [shard.samples for shard in manifest.shards]) == (3, 5, [1, 0, 2])
    rows = read_rows(tmp_path / "out")
    errors = [row["error"] for row in rows]
    assert errors[2:4] == ["dropped: e-mail address", "dropped: e-mail address, phone number"]
    assert errors[4] == "dropped: IP address, card number, social handle"
    assert all(row["captions"] is None and row["caption"] is None for row in rows if row["error"])
    assert [row["key"] for row in rows] == [row["key"] for row in read_rows(dataset)]
    assert read_report(tmp_path / "out")["dropped"] == {"email": 2, "phone": 2, "card": 1, "handle": 2, "ip": 1}
    assert not any(b"example.com" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_opt_outs_are_gone_and_the_proof_does_not_name_them(dataset, tmp_path, run_data_tools):
    before = read_rows(dataset)
    by_key, by_source, by_hash = before[1], before[6], before[7]
    entries = [by_key["key"], by_source["source"], by_hash["sha256"]]
    (tmp_path / "one.txt").write_text(f"{entries[0]}\r\n\n  {entries[1]}  \n")
    (tmp_path / "two.txt").write_text(f"{entries[2].upper()}\nhttps://example.org/not-here.jpg\nnone.jpg\n")
    lists = ["--remove", tmp_path / "one.txt", tmp_path / "two.txt"]
    run = run_data_tools("privacy", dataset, tmp_path / "out", "--faces", "keep", *lists, "--processes", 1, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["removed"] == {
        "samples": 4,
        "entries_asked": 5,
        "entries_met": 4,
        "entries_sha256": sorted(hashlib.sha256(text.encode()).hexdigest() for text in [*entries, "none.jpg"]),
    }
    manifest = Manifest.load(tmp_path / "out")
    hashes = sorted(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("one.txt", "two.txt"))
    assert manifest.options["removal_lists_sha256"] == hashes
    assert manifest.options["report"]["removed"] == report["removed"]
    gone = [row for row in read_rows(tmp_path / "out") if row["error"] == "removed: opt-out"]
    assert [row["key"] for row in gone] == [before[0]["key"], *(row["key"] for row in (by_key, by_source, by_hash))]
    assert all({name for name, value in row.items() if value is not None} == {"key", "status", "error"} for row in gone)
    assert not {row["key"] for row in gone} & read_samples(tmp_path / "out").keys()
    named = [by_source["source"].encode(), by_hash["sha256"].encode(), b"none.jpg"]
    for path in (tmp_path / "out").iterdir():
        assert not any(name in path.read_bytes() for name in named), path.name


def test_extra_texts_are_masked_and_identifiers_are_not(dataset, tmp_path):
    """Columns that other inputs bring, in the sidecar and in json."""
    from data_tools.files import hash_file, open_folder
    from data_tools.folder import write_sidecar
    from data_tools.shards import ShardInfo, write_shard

    extra = {
        "alt": "mail jane@example.com",
        "url": "https://example.com/@jane",
        "id": "4111111111111111",
        "nested": json.dumps({"by": ["@jane_doe", 4111111111111111]}),
    }
    manifest = Manifest.load(dataset)
    samples = read_samples(dataset)
    infos = []
    for shard in manifest.shards:
        path = dataset / shard.name
        table = pyarrow.parquet.read_table(path.with_suffix(".parquet"))
        rows = [{**row, **extra} for row in table.to_pylist()]
        schema = table.schema
        for name in extra:
            schema = schema.append(pyarrow.field(name, pyarrow.string()))
        with write_shard(path.parent, path.name) as writer:
            for row in rows:
                if row["status"] == "success":
                    fields = samples[row["key"]]
                    content = {**json.loads(fields["json"]), **extra}
                    row["offset"], row["size"] = writer.add(
                        row["key"], {**fields, "json": json.dumps(content).encode()}
                    )
        write_sidecar(open_folder(path.parent), path.name, rows, schema)
        infos.append(writer.info)
    assert isinstance(infos[0], ShardInfo) and hash_file(dataset / infos[0].name) == infos[0].sha256
    Manifest.of_shards(dataset, infos, "x", manifest.failures, manifest.captions, {"made": "here"}).write()

    clean_dataset(dataset, tmp_path / "out", faces="keep", processes=1)
    expected = {**extra, "alt": "mail [email]", "nested": '{"by": ["[handle]", 4111111111111111]}'}
    for row in read_rows(tmp_path / "out"):
        assert {name: row[name] for name in extra} == expected
    for fields in read_samples(tmp_path / "out").values():
        content = json.loads(fields["json"])
        assert {name: content[name] for name in extra} == expected


def test_given_boxes_are_hidden_and_other_pictures_keep_their_bytes(dataset, tmp_path, capsys):
    before, keys = read_samples(dataset), list(read_samples(dataset))
    boxes = write_boxes(
        tmp_path / "boxes.parquet",
        [(keys[2], 20.0, 20.0, 20.0, 20.0), (keys[5], 0.0, 0.0, 9.0, 9.0), ("no", 1.0, 1.0, 1.0, 1.0)],
    )
    clean_dataset(dataset, tmp_path / "out", captions="keep", boxes=boxes, processes=1)
    after = read_samples(tmp_path / "out")
    assert [key for key in keys if after[key]["jpg"] != before[key]["jpg"]] == [keys[2], keys[5]]
    assert "1 of 3 boxes have keys of other samples" in capsys.readouterr().err
    old, new = (
        np.asarray(Image.open(io.BytesIO(samples[keys[2]]["jpg"])).convert("L"), float) for samples in (before, after)
    )
    inside, outside = np.s_[14:43, 17:43], np.s_[50:, :]
    assert new[inside].std() < old[inside].std() / 4
    assert np.abs(new[outside] - old[outside]).mean() < 5
    row = next(row for row in read_rows(tmp_path / "out") if row["key"] == keys[2])
    content = json.loads(after[keys[2]]["json"])
    assert row["sha256"] == content["sha256"] == hashlib.sha256(after[keys[2]]["jpg"]).hexdigest()
    assert (read_report(tmp_path / "out")["faces"], read_report(tmp_path / "out")["pictures_with_faces"]) == (2, 2)


def test_a_box_outside_its_picture_fails_the_sample(dataset, tmp_path):
    keys = list(read_samples(dataset))
    boxes = write_boxes(tmp_path / "boxes.parquet", [(keys[1], 500.0, 10.0, 20.0, 20.0)])
    manifest = clean_dataset(dataset, tmp_path / "out", boxes=boxes, processes=1)
    assert manifest.samples == 6 and keys[1] not in read_samples(tmp_path / "out")
    row = next(row for row in read_rows(tmp_path / "out") if row["key"] == keys[1])
    assert row["error"] == "picture not looked at: the box 500, 10, 20, 20 lies outside of its 64 x 70 pixels"


def draw_face(size: int = 160) -> Image.Image:
    """A drawn face that the frontal cascade knows, so that no photograph of anyone is needed."""
    image = np.full((size, size, 3), 150, np.uint8)
    s = size / 160

    def at(x, y):
        return int(x * s), int(y * s)

    cv2.ellipse(image, at(80, 85), at(42, 54), 0, 0, 360, (205, 205, 205), -1)
    cv2.ellipse(image, at(80, 45), at(44, 26), 0, 180, 360, (60, 60, 60), -1)
    for x in (62, 98):
        cv2.ellipse(image, at(x, 72), at(12, 7), 0, 0, 360, (110, 110, 110), -1)
        cv2.circle(image, at(x, 72), int(5 * s), (30, 30, 30), -1)
        cv2.ellipse(image, at(x, 62), at(14, 4), 0, 180, 360, (60, 60, 60), -1)
    cv2.line(image, at(80, 75), at(80, 98), (165, 165, 165), int(6 * s))
    cv2.ellipse(image, at(80, 104), at(10, 4), 0, 0, 360, (140, 140, 140), -1)
    cv2.ellipse(image, at(80, 118), at(18, 5), 0, 0, 360, (90, 90, 90), -1)
    return Image.fromarray(cv2.GaussianBlur(image, (0, 0), 1.5 * s))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def finder():
    return FaceFinder()


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95})])
def test_a_found_face_is_found_no_more(finder, kind, options):
    data = encode(draw_face(), kind, **options)
    boxes = finder.find(Image.open(io.BytesIO(data)))
    assert len(boxes) == 1 and abs(boxes[0].x + boxes[0].width / 2 - 80) < 12
    hidden, width, height, faces = hide_faces(data, finder, [])
    image = Image.open(io.BytesIO(hidden))
    assert (image.format, image.size, (width, height), faces) == (kind, (160, 160), (160, 160), 1)
    assert finder.find(image) == []
    assert hide_faces(hidden, finder, []) == (hidden, 160, 160, 0)


def test_a_turned_picture_is_searched_upright_and_its_thumbnail_goes(finder):
    sideways = draw_face().transpose(Image.Transpose.ROTATE_90)
    sideways = sideways.crop((0, 0, 160, 150))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    exif[0x010E] = "thumbnail of a face"
    data = encode(sideways, exif=exif, quality=95)
    hidden, width, height, faces = hide_faces(data, finder, [])
    assert (width, height, faces) == (150, 160, 1)
    image = Image.open(io.BytesIO(hidden))
    assert image.size == (150, 160) and not image.getexif() and b"thumbnail" not in hidden
    # A given box is in pixels as stored: left in the stored picture is above in the upright one.
    hidden, *_ = hide_faces(data, None, [Box(0, 40, 40, 80)])
    upright = np.asarray(Image.open(io.BytesIO(hidden)).convert("L"), float)
    plain = np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270).convert("L"), float)
    change = np.abs(upright - plain)
    assert change[:40, 40:110].mean() > 10 * change[80:].mean()


@pytest.mark.parametrize("data", [b"", b"not a picture", encode(Image.new("RGB", (40, 40)))[:300]])
def test_what_cannot_be_looked_at_is_refused(finder, data):
    with pytest.raises(FaceError):
        hide_faces(data, finder, [])


def test_a_mode_with_transparency_keeps_it(finder):
    image = Image.new("P", (40, 40), 3)
    image.putpalette([*range(256)] * 3)
    data = encode(image, "PNG", transparency=3)
    hidden, *_ = hide_faces(data, None, [Box(5, 5, 10, 10)])
    assert Image.open(io.BytesIO(hidden)).convert("RGBA").getpixel((0, 0))[3] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_hidden_face_depends_on_the_means_of_its_cells_alone(height, width, seed):
    """Shuffle the pixels inside every cell: the same result, so no one can tell the one picture from the other."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = np.linspace(0, height, min(CELLS, height) + 1).astype(int)
    columns = np.linspace(0, width, min(CELLS, width) + 1).astype(int)
    shuffled = pixels.copy()
    for top, bottom in zip(rows, rows[1:], strict=False):
        for left, right in zip(columns, columns[1:], strict=False):
            cell = shuffled[top:bottom, left:right].reshape(-1, 3)
            shuffled[top:bottom, left:right] = random.permutation(cell).reshape(bottom - top, right - left, 3)
    assert np.array_equal(obscure(pixels), obscure(shuffled))
    assert obscure(pixels).shape == pixels.shape and obscure(pixels[..., 0]).shape == pixels.shape[:2]
    flat = np.full_like(pixels, 77)
    assert np.array_equal(obscure(flat), flat)


def test_the_same_bytes_from_any_processes_and_after_any_interruption(dataset, tmp_path, read_folder):
    (tmp_path / "remove.txt").write_text("1.jpg\n")
    options = {"remove": [tmp_path / "remove.txt"], "captions": "mask"}
    clean_dataset(dataset, tmp_path / "one", processes=1, **options)
    clean_dataset(dataset, tmp_path / "two", processes=2, **options)
    whole = read_folder(tmp_path / "one")
    assert whole == read_folder(tmp_path / "two")
    # As power may fail at any file: the manifest is missing, a shard has no statistics, another one is cut.
    (tmp_path / "two" / "manifest.json").unlink()
    (tmp_path / "two" / "00001_stats.json").unlink()
    (tmp_path / "two" / "00002.tar").write_bytes(b"short")
    (tmp_path / "two" / "00000.tar.0123abcd.tmp").write_bytes(b"half")
    clean_dataset(dataset, tmp_path / "two", processes=1, **options)
    assert whole == read_folder(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}
    clean_dataset(dataset, tmp_path / "two", processes=1, **options)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}


def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path, write_table, read_folder, start_data_tools):
    table, images = write_table(30, size=64)
    build_shards(table, tmp_path / "set", images, samples_per_shard=5, processes=1)
    clean_dataset(tmp_path / "set", tmp_path / "whole", processes=2)
    out = tmp_path / "out"
    started = ["privacy", tmp_path / "set", out, "--processes", 2]
    for stem in ("00001", "00004"):
        process = start_data_tools(*started)
        while not (out / f"{stem}_stats.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (out / "manifest.json").exists()
        time.sleep(0.3)  # its workers end at their next report, and let go of the files
    last = start_data_tools(*started)
    stdout, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert "going on, " in stdout
    assert read_folder(out) == read_folder(tmp_path / "whole")


def test_another_run_is_refused_and_nothing_is_changed_in_place(dataset, tmp_path, read_folder):
    before = read_folder(dataset)
    out = tmp_path / "out"
    clean_dataset(dataset, out, faces="keep", processes=1)
    cases = [
        ({"out": dataset}, "this is the folder to read"),
        ({"out": dataset, "restart": True}, "this is the folder to read"),
        ({"captions": "drop"}, "captions mask, not drop"),
        ({"captions": "keep"}, "nothing would be changed"),
        ({"captions": "shout"}, "Valid: mask, drop, keep"),
        ({"boxes": tmp_path / "x.parquet"}, "boxes are there to be blurred"),
        ({"directory": out, "out": tmp_path / "none" / ".." / "set", "restart": True}, "holds what `build` wrote"),
    ]
    (tmp_path / "none").mkdir()
    for case, text in cases:
        with pytest.raises(UserError, match=text):
            clean_dataset(**{"directory": dataset, "out": out, "faces": "keep", "processes": 1, **case})
    assert read_folder(dataset) == before
    with pytest.raises(UserError, match="holds what `privacy` wrote"):
        build_shards(tmp_path / "table.tsv", out, tmp_path / "images", restart=True, processes=1)
    clean_dataset(dataset, out, faces="keep", captions="drop", restart=True, processes=1)
    assert Manifest.load(out).samples == 3


def test_wrong_lists_and_boxes_are_one_clear_line(dataset, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "text.parquet").write_text("key,x")
    short = tmp_path / "short.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"], "x": [1]}), short)
    strings = tmp_path / "strings.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": [1], "x": [1], "y": [1], "width": [1], "height": [1]}), strings)
    keys = list(read_samples(dataset))
    flat = write_boxes(tmp_path / "flat.parquet", [(keys[0], 1.0, 1.0, 0.0, 5.0)])
    foreign = write_boxes(tmp_path / "foreign.parquet", [("elsewhere", 1.0, 1.0, 5.0, 5.0)])
    everything = tmp_path / "all.txt"
    everything.write_text("\n".join(keys))
    cases = [
        ({"remove": [tmp_path / "empty.txt"]}, "the list is empty"),
        ({"remove": [tmp_path / "latin.txt"]}, "not UTF-8"),
        ({"remove": [everything], "faces": "keep"}, r"no sample would be left \(removed 7, missing picture 1\)"),
        ({"boxes": tmp_path / "text.parquet"}, "not a parquet file"),
        ({"boxes": short}, "no column 'y'"),
        ({"boxes": strings}, "column 'key' holds int64"),
        ({"boxes": flat}, "sizes greater than 0"),
        ({"boxes": foreign}, "none of its 1 keys"),
    ]
    for place, (case, text) in enumerate(cases):
        with pytest.raises(UserError, match=text):
            clean_dataset(dataset, tmp_path / f"out{place}", processes=1, **case)
        assert not (tmp_path / f"out{place}" / "manifest.json").exists()


def test_damage_is_not_copied(dataset, tmp_path):
    tar = dataset / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match="key 000010000: not the picture that its sidecar lists"):
        clean_dataset(dataset, tmp_path / "out", faces="keep", processes=1)


def test_info_reads_what_privacy_wrote(dataset, tmp_path, capsys):
    clean_dataset(dataset, tmp_path / "out", captions="drop", faces="keep", processes=1)
    capsys.readouterr()
    print_info(tmp_path / "out")
    text = capsys.readouterr().out
    assert "failures     5 (" in text and "dropped: e-mail address 1" in " ".join(text.split())
    assert "missing picture 1" in " ".join(text.split())
    assert os.path.exists(tmp_path / "out" / "sizes.json")
