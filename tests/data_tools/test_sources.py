"""Inputs as people have them, and as nobody should have them: tables, JSON, parquet, Arrow, folders and tars."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.image import PictureError
from data_tools.inputs import MAX_LINE_BYTES, SIDECAR_COLUMNS
from data_tools.sources import Row, open_source, read_rows
from data_tools.tar import render_member


@pytest.fixture
def read(tmp_path):
    def read(name: str, content: str | bytes, columns=("filename", "caption")) -> list[Row]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(path, *columns))

    return read


def test_quotes_in_a_tsv_are_characters(read):
    rows = read("t.tsv", 'filename\tcaption\na.jpg\ta 6" nail\nb.jpg\t"quoted"\nc.jpg\t"open, and\nd.jpg\tlast')
    assert [row.caption for row in rows] == ['a 6" nail', '"quoted"', '"open, and', "last"]


def test_a_tsv_may_have_windows_line_ends_a_mark_and_odd_separators(read):
    rows = read("t.tsv", b"\xef\xbb\xbffilename\tcaption\r\na.jpg\tone\xe2\x80\xa8two\r\n\r\nb.jpg\t  three \r\n")
    assert rows == [Row("a.jpg", "one\u2028two", ""), Row("b.jpg", "three", "")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_parted_by_what_its_header_has(read, delimiter):
    lines = [["id", "caption", "filename"], ["1", '"a dog, a cat; a ""b|ox""\nand more"', "a.jpg"], ["2", "x", "b.jpg"]]
    rows = read("t.csv", "\n".join(delimiter.join(line) for line in lines))
    assert rows == [Row("a.jpg", 'a dog, a cat; a "b|ox"\nand more', ""), Row("b.jpg", "x", "")]


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", "\t"), ("t.csv", ",")])
def test_rows_without_a_caption_are_refused_with_a_reason(read, name, delimiter):
    lines = [["filename", "caption"], ["a.jpg", " "], ["a.jpg"], ["a.jpg", "x", "y"], ["a.jpg", "x"]]
    rows = read(name, "\n".join(delimiter.join(line) for line in lines))
    assert [(row.image, row.refusal) for row in rows] == [
        ("a.jpg", "empty caption"),
        ("a.jpg", "row of 1 cells under a header of 2"),
        ("a.jpg", "row of 3 cells under a header of 2"),
        ("a.jpg", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "t.tsv",
            "filename\tcaptions\n",
            "no column 'caption'. Did you mean 'captions'? The columns are: filename, capt",
        ),
        ("t.csv", "image,text\n", "no column 'filename'. The columns are: image, text. Name yours with --image-column"),
        ("t.tsv", "", "no column 'filename'"),
        ("t.csv", "", "no column 'filename'"),
        ("t.xml", "", "unknown kind of table '.xml'. Valid: .tsv, .csv"),
        ("t.tsv", b"filename\tcaption\na\tcaf\xe9\n", "not UTF-8 text"),
        ("t.csv", b"filename,caption\na,caf\xe9\n", "not UTF-8 text"),
        (
            "t.csv",
            'filename,caption\na,b\nc,"open\nd,e\n',
            "line 4: unexpected end of data. Quote cells as in RFC 4180",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(read, name, content, text):
    with pytest.raises(UserError) as caught:
        read(name, content)
    assert text in str(caught.value) and "\n" not in str(caught.value)


# Tables


def refuses(path, text: str, **options) -> None:
    with pytest.raises(UserError) as caught:
        list(open_source(path, **options).rows())
    assert text in str(caught.value) and "\n" not in str(caught.value)


def pairs(source) -> list[tuple[str, str]]:
    return [(row.image, row.caption or row.refusal) for row in source.rows()]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".tsv.gz", ".jsonl.gz"])
def test_one_content_in_any_form_makes_the_same_rows(tmp_path, suffix):
    expected = [("a.jpg", "ein Hund"), ("a.jpg", "\u72d7"), ("b.jpg", 'a "cat"')]
    rows = [["id", "file_name", "caption"], *([str(number), *pair] for number, pair in enumerate(expected))]
    if suffix.startswith(".csv"):
        text = "\r\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    elif suffix.startswith(".tsv"):
        text = "\n".join("\t".join(row) for row in rows)
    elif suffix == ".json":
        images = [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
        ids = {"a.jpg": 7, "b.jpg": 3}
        text = json.dumps({"images": images, "annotations": [{"image_id": ids[i], "caption": c} for i, c in expected]})
    else:
        text = "\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:])
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    source = open_source(path)
    assert pairs(source) == expected == pairs(source)
    assert source.extra_columns() == {"id": pyarrow.int64() if suffix == ".json" else pyarrow.string()}
    assert list(open_source(path, keep_columns=()).rows()) == [Row(*pair, "") for pair in expected]


def test_other_columns_are_kept_under_names_that_do_not_collide(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("url,TEXT,width,source_width,note\nhttp://x/a.jpg,a dog,640,9,\n")
    source = open_source(path)
    assert list(source.extra_columns()) == ["source_source_width", "source_width", "note"]
    (row,) = source.rows()
    extra = json.loads(row.extra)
    assert (row.image, row.caption) == ("http://x/a.jpg", "a dog")
    assert extra == {"source_source_width": "640", "source_width": "9", "note": ""}
    (row,) = open_source(path, keep_columns=["note"]).rows()
    assert json.loads(row.extra) == {"note": ""}
    refuses(path, "no column 'notes' to keep. Did you mean 'note'?", keep_columns=["notes"])


def test_columns_that_are_not_clear_are_refused_with_a_list(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("url,image,caption\nx,y,z\n")
    refuses(path, "the image could be any of url, image. The columns are: url, image, caption. Name yours with --image")
    assert pairs(open_source(path, image_column="url")) == [("x", "z")]
    path.write_text("url,label\nx,y\n")
    refuses(path, "no column is known to hold the caption. The columns are: url, label")


def test_captions_in_a_json_list_become_rows(read):
    rows = read("t.tsv", 'filename\tcaption\na.jpg\t["one", " ", "two"]\nb.jpg\t[1, 2]\nc.jpg\t[sic] said he')
    assert [(row.image, row.caption, row.refusal) for row in rows] == [
        ("a.jpg", "one", ""),
        ("a.jpg", "", "empty caption"),
        ("a.jpg", "two", ""),
        ("b.jpg", "[1, 2]", ""),
        ("c.jpg", "[sic] said he", ""),
    ]


BAD = [
    (b"a.jpg", b"caf\xe9", "line that is not UTF-8 text"),
    (b"a.jpg", b"x\0y", "caption with a NUL character"),
    (b"a.jpg", b"x" * 1_000_000, "caption of more than 100000 characters"),
    (b"a\0.jpg", b"x", "image name with a NUL character"),
    (b"", b"x", "empty image name"),
]


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", b"\t"), ("t.csv", b",")])
def test_hostile_rows_of_a_table_are_refused_and_the_others_stay(read, name, delimiter):
    good = [delimiter.join((b"%d.jpg" % number, "caf\u00e9".encode())) for number in range(10)]
    lines = [delimiter.join((b"filename", b"caption")), *(delimiter.join(bad[:2]) for bad in BAD), *good]
    rows = read(name, b"\n".join(lines))
    assert [row.refusal for row in rows] == [refusal for _, _, refusal in BAD] + [""] * 10
    assert [row.image for row in rows[:5]] == ["a.jpg", "a.jpg", "a.jpg", "line 5", "line 6"]
    assert all(row.caption == "" for row in rows[:5]) and rows[-1].caption == "caf\u00e9"


def test_a_line_that_is_too_long_to_hold_is_refused(tmp_path):
    long = "x" * (MAX_LINE_BYTES + 10)
    (tmp_path / "t.tsv").write_text(f"filename\tcaption\na\t{long}\nb\tshort\n")
    refusal = f"line of more than {MAX_LINE_BYTES} bytes"
    assert pairs(open_source(tmp_path / "t.tsv")) == [("line 2", refusal), ("b", "short")]
    (tmp_path / "t.jsonl").write_text(f'{{"file": "a", "text": "y"}}\n{long}\n{{"file": "b", "text": "z"}}')
    assert pairs(open_source(tmp_path / "t.jsonl")) == [("a", "y"), ("line 2", refusal), ("b", "z")]
    (tmp_path / "t.csv").write_text(f'filename,caption\na,"{long}')
    refuses(tmp_path / "t.csv", "t.csv: ")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json"])
def test_a_truncated_gzip_is_one_clear_error(tmp_path, suffix):
    path = tmp_path / f"t{suffix}.gz"
    lines = [f'{{"file": "{os.urandom(9).hex()}", "caption": "x"}}' for _ in range(3000)]
    text = "\n".join(lines if suffix == ".jsonl" else ["file\tcaption", *("a\t" + os.urandom(9).hex() for _ in lines)])
    if suffix == ".csv":
        text = text.replace("\t", ",")
    path.write_bytes(gzip.compress(text.encode())[:-2000])
    refuses(path, "truncated or damaged gzip")
    path.write_bytes(b"not gzip at all")
    refuses(path, "truncated or damaged gzip")


def test_tables_in_parts_are_read_as_one(tmp_path):
    for number in range(3):
        (tmp_path / f"p{number}.csv").write_text(f"filename,caption,c{number}\n{number}.jpg,x,{number}\nbad\n")
    source = open_source(f"{tmp_path}/p{{0..1}}.csv")
    assert [(row.image, row.extra) for row in source.rows()] == [
        ("0.jpg", '{"c0": "0"}'),
        ("bad", ""),
        ("1.jpg", '{"c1": "1"}'),
        ("bad", ""),
    ]
    assert list(source.extra_columns()) == ["c0", "c1"]
    assert [row.image for row in open_source(f"{tmp_path}/*.csv").rows()][::2] == ["0.jpg", "1.jpg", "2.jpg"]
    assert pairs(open_source(tmp_path)) == pairs(open_source(f"{tmp_path}/*.csv"))
    refuses(f"{tmp_path}/p{{0..5}}.csv", "3 of 6 files are not there (first: ")
    refuses(f"{tmp_path}/x*.csv", "no file is named so")
    refuses(f"{tmp_path}/absent.csv", "no such file or folder")
    (tmp_path / "p3.tsv").write_text("filename\tcaption\n")
    refuses(f"{tmp_path}/p*", "files of several kinds: .csv, .tsv")


def test_the_kind_can_be_given(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("filename\tcaption\na.jpg\tx\n")
    assert pairs(open_source(path, kind="tsv")) == pairs(open_source(path, kind=".tsv")) == [("a.jpg", "x")]
    refuses(path, "unknown kind 'tvs'. Did you mean 'tsv'? Valid: tsv, csv", kind="tvs")


def test_identity_is_of_the_content(tmp_path):
    identities = {}
    for name, text in [
        ("a/t.csv", "file,text\na,b\n"),
        ("b/u.csv", "file,text\na,b\n"),
        ("c/t.csv", "file,text\na,c\n"),
    ]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        identities[name] = open_source(tmp_path / name).identity()
    assert identities["a/t.csv"] == identities["b/u.csv"] != identities["c/t.csv"]
    assert all(len(identity) == 64 for identity in identities.values())


def test_a_table_and_parquet_can_lie_at_a_url(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/in/t.csv", b"url,caption\nhttp://x/a.jpg,a dog\n")
    system.pipe("/in/t.jsonl.gz", gzip.compress(b'{"url": "b", "caption": "c"}\n'))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"one", b"two"], "caption": ["x", "y"]}), buffer)
    system.pipe("/in/p/0.parquet", buffer.getvalue())
    system.pipe("/in/00.tar", render_member("k.jpg", b"JPG") + render_member("k.txt", b"a cat") + bytes(1024))
    assert pairs(open_source("memory://in/t.csv")) == [("http://x/a.jpg", "a dog")]
    assert pairs(open_source("memory://in/t.jsonl.gz")) == [("b", "c")]
    for url in ("memory://in/p", "memory://in/p/*.parquet"):
        source = open_source(url)
        assert pairs(source) == [("0.parquet/0", "x"), ("0.parquet/1", "y")]
        assert [source.read_embedded(row.place) for row in source.rows()] == [b"one", b"two"]
    source = open_source("memory://in/{00..00}.tar")
    assert [(row.image, source.read_embedded(row.place)) for row in source.rows()] == [("00.tar/k.jpg", b"JPG")]
    refuses("memory://in/absent.csv", "memory://in/absent.csv: cannot be opened (FileNotFoundError")
    refuses("nosuch://in/t.csv", "nosuch://in/t.csv: this kind of URL cannot be opened")


# Flickr30k, Conceptual Captions, COCO


def test_flickr30k_in_both_forms(tmp_path):
    (tmp_path / "results.csv").write_text(
        'image_name| comment_number| comment\n1.jpg| 0| A man | a "plan .\n1.jpg| 1| "Two" men .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\nnonsense\n"
    )
    expected = [
        ("1.jpg", 'A man | a "plan .'),
        ("1.jpg", '"Two" men .'),
        ("2199200615.jpg", "A dog runs across the grass ."),
    ]
    found = pairs(open_source(tmp_path / "results.csv"))
    assert found == [*expected, ("line 5", "line that is not a row of Flickr30k")]
    (tmp_path / "results.token").write_text("1.jpg#0\tA man .\n1#2.jpg#1\tTwo #1\tmen .\n")
    assert pairs(open_source(tmp_path / "results.token")) == [("1.jpg", "A man ."), ("1#2.jpg", "Two #1\tmen .")]
    os.rename(tmp_path / "results.token", tmp_path / "token.txt")
    assert len(pairs(open_source(tmp_path / "token.txt", kind="flickr30k"))) == 2


def test_conceptual_captions_without_a_header(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("a dog\thttp://x/1.jpg\na cat\thttp://x/2.jpg\n")
    (tmp_path / "cc12m.tsv").write_text("http://x/1.jpg\ta dog\nhttp://x/2.jpg\ta cat\n")
    expected = [("http://x/1.jpg", "a dog"), ("http://x/2.jpg", "a cat")]
    for name in ("cc3m", "cc12m"):
        path = tmp_path / f"{name}.tsv"
        assert pairs(open_source(path)) == pairs(open_source(path, kind=name)) == expected
        assert open_source(path).extra_columns() == {}
    (tmp_path / "t.tsv").write_text("caption\turl\na dog\thttp://x/1.jpg\n")
    assert pairs(open_source(tmp_path / "t.tsv")) == expected[:1]


def test_coco_keeps_its_images_order_and_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "annotations.json"
    content = {
        "images": [
            {"id": 9, "file_name": "9.jpg", "height": 4, "coco_url": "http://x/9.jpg"},
            {"id": 2, "file_name": "2.jpg"},
            "x",
            {"id": [1], "file_name": "3.jpg"},
        ],
        "annotations": [
            {"image_id": 2, "caption": "two"},
            {"image_id": 9, "caption": "nine"},
            {"image_id": 2, "caption": None},
            {"image_id": 5, "caption": "lost"},
        ],
    }
    path.write_text(json.dumps(content))
    source = open_source(path)
    assert pairs(source) == [
        ("9.jpg", "nine"),
        ("2.jpg", "two"),
        ("2.jpg", "empty caption"),
        ("image 2", "image entry that is not an object"),
        ("3.jpg", "no caption"),
        ("image_id 5", "captions of an image that is not listed"),
    ]
    assert json.loads(next(source.rows()).extra) == {"id": "9", "source_height": 4, "coco_url": "http://x/9.jpg"}
    assert pairs(open_source(path, image_column="coco_url"))[0] == ("http://x/9.jpg", "nine")
    path.write_text(json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}))
    refuses(path, "no annotation has a 'caption'")
    path.write_text('{"images": [')
    refuses(path, "not COCO's captions")


# JSON lines


def test_broken_json_lines_are_refused_by_their_number(tmp_path):
    path = tmp_path / "t.ndjson"
    lines = [
        b'\xef\xbb\xbf{"image": "a", "captions": ["one", 2, "\\ud800"]}',
        b"{broken",
        b"",
        b'{"image": "b", "captions": "caf\xe9"}',
        b"[1]",
        b'{"image": 5, "captions": "x"}',
        b'{"captions": "x"}',
        b'{"image": "c", "captions": {"en": "x"}}',
        b"[" * 100_000,
        b'{"image": "\\ud800", "captions": "x"}',
        b'{"image": "d", "captions": "last", "id": NaN}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    assert pairs(open_source(path)) == [
        ("a", "one"),
        ("a", "caption that is not text"),
        ("a", "caption that is not UTF-8 text"),
        ("line 2", "line that is not a JSON object"),
        ("line 4", "line that is not a JSON object"),
        ("line 5", "line that is not a JSON object"),
        ("line 6", "image name that is not text"),
        ("line 7", "empty image name"),
        ("c", "caption that is not text"),
        ("line 9", "line that is not a JSON object"),
        ("\\ud800", "image name that is not UTF-8 text"),
        ("d", "last"),
    ]


def test_types_of_json_fields_are_learned_from_all_rows(tmp_path):
    path = tmp_path / "t.jsonl"
    values = {
        "integer": [1, 2**63 - 1, None],
        "number": [1, 0.5, float("nan")],
        "flag": [True, False, None],
        "word": ["x", "\ud800", None],
        "large": [1, 2**63, 3],
        "mixed": [1, "one", True],
        "nested": [{"a": 1}, [2], None],
        "nothing": [None, None, None],
    }
    rows = [{"url": "u", "text": "t"} | {name: column[row] for name, column in values.items()} for row in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(path)
    types = source.extra_columns()
    assert {name: str(kind) for name, kind in types.items()} == {
        "integer": "int64",
        "number": "double",
        "flag": "bool",
        **dict.fromkeys(("word", "large", "mixed", "nested", "nothing"), "string"),
    }
    extras = [json.loads(row.extra) for row in source.rows()]
    table = pyarrow.Table.from_pylist(extras, pyarrow.schema(list(types.items())))
    assert table.to_pydict() == {
        "integer": [1, 2**63 - 1, None],
        "number": [1.0, 0.5, None],
        "flag": [True, False, None],
        "word": ["x", "\\ud800", None],
        "large": ["1", str(2**63), "3"],
        "mixed": ["1", "one", "true"],
        "nested": ['{"a": 1}', "[2]", None],
        "nothing": [None, None, None],
    }


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "width", "", "\ud800"]), JSON_VALUES), max_size=5))
def test_whatever_stands_in_json_fits_the_columns_that_are_told(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(json.dumps({"url": "u", "text": "t"} | record) for record in [{}, *records]))
    source = open_source(path)
    extras = [json.loads(row.extra or "{}") for row in source.rows()]
    table = pyarrow.Table.from_pylist(extras, pyarrow.schema(list(source.extra_columns().items())))
    assert len(extras) == len(records) + 1 and not {*table.column_names} & {*SIDECAR_COLUMNS, ""}


# Folders


@pytest.fixture
def folder(tmp_path):
    def write(files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "in"

    return write


def test_a_folder_of_pictures_with_captions_beside_them(folder):
    root = folder(
        {
            "b.jpg": b"B",
            "b.txt": b"\xef\xbb\xbf a dog\n",
            "a.PNG": b"A",
            "a.json": b'{"captions": ["one", "two"], "width": 3, "score": 0.5}',
            "a.txt": b"ignored",
            "sub/c.v1.webp": b"C",
            "sub/c.v1.json": b'{"text": "a cat", "score": 1}',
            "d.jpg": b"D",
            "e.jpg": b"E",
            "e.txt": b"caf\xe9",
            ".hidden/f.jpg": b"F",
            "._b.jpg": b"junk",
        }
    )
    source = open_source(root)
    assert source.embedded and pairs(source) == [
        ("a.PNG", "one"),
        ("a.PNG", "two"),
        ("b.jpg", "a dog"),
        ("d.jpg", "no caption"),
        ("e.jpg", "caption that is not UTF-8 text"),
        ("sub/c.v1.webp", "a cat"),
    ]
    rows = {row.image: row for row in source.rows()}
    assert json.loads(rows["a.PNG"].extra) == {"source_width": 3, "score": 0.5}
    assert source.extra_columns() == {"source_width": pyarrow.int64(), "score": pyarrow.float64()}
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read_embedded(rows["sub/c.v1.webp"].place) == b"C" and copy.read_embedded(rows["a.PNG"].place) == b"A"
    (root / "b.jpg").unlink()
    with pytest.raises(PictureError, match="missing picture"):
        source.read_embedded(rows["b.jpg"].place)


def test_links_in_a_folder_do_no_harm(folder):
    root = folder({"a.jpg": b"A", "a.txt": b"x", "sub/b.jpg": b"B", "sub/b.txt": b"y"})
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to("..")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "a.json")
    (root / "dir.jpg").mkdir()
    assert pairs(open_source(root)) == [
        ("a.jpg", "caption file: not a file"),
        ("gone.jpg", "link that leads nowhere"),
        ("pipe.jpg", "not a file"),
        ("self.jpg", "link that leads nowhere"),
        ("sub/b.jpg", "y"),
    ]


def test_a_file_name_that_is_not_utf8_is_a_refused_row(folder):
    root = folder({"a.jpg": b"A", "a.txt": b"x"})
    with open(os.fsencode(root) + b"/caf\xe9.jpg", "wb"):
        pass
    with open(os.fsencode(root) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"z")
    rows = list(open_source(root).rows())
    assert [row.refusal for row in rows] == ["", "image name that is not UTF-8 text"]
    assert all(field.encode() is not None for row in rows for field in row)


def test_what_a_folder_holds_is_found_or_asked_for(folder, tmp_path):
    root = folder({"a.jpg": b"A", "a.txt": b"x", "t.parquet": b""})
    refuses(root, "could be any of folder, .parquet. Give a file or a pattern in it, or the kind")
    assert pairs(open_source(root, kind="folder")) == [("a.jpg", "x")]
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "holds nothing that is known")
    refuses(tmp_path / "empty", "no picture is here or below", kind="folder")
    refuses(tmp_path / "empty", "no .parquet file is here or below", kind="parquet")


def test_the_identity_of_a_folder_is_of_names_sizes_and_captions(folder):
    def identify(files) -> str:
        return open_source(folder(files)).identity()

    first = identify({"a.jpg": b"A", "a.txt": b"x"})
    assert identify({"a.jpg": b"B"}) == first != identify({"a.txt": b"y"})
    assert identify({"a.txt": b"x"}) == first != identify({"a.jpg": b"AA"})


# Tars


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), "/etc/passwd" if kind in b"12" else ""
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def write_tar(tmp_path):
    def write(name: str, members: list[tuple], tar_format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=tar_format) as tar:
            for member in members:
                add(tar, *member)
        return path

    return write


def read_pictures(source) -> dict[str, bytes]:
    return {row.image: source.read_embedded(row.place) for row in source.rows() if row.place}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_webdataset_tars(write_tar, tmp_path, tar_format):
    long = "long/" + "n" * 90 + "/" + "m" * 60
    write_tar(
        "in/00.tar",
        [("k1.jpg", b"1"), ("k1.txt", b" one "), ("k1.json", b'{"url": "u", "key": "k", "n": 1}')],
        tar_format,
    )
    members = [(f"{long}.png", b"2"), (f"{long}.json", b'{"captions": ["a", "b"], "n": 2}')]
    write_tar("in/01.tar", [*members, ("./k3.cls", b"3"), ("./k3.JPG", b"3"), ("./k3.txt", b"c")], tar_format)
    (tmp_path / "in" / "00.tar.idx").write_bytes(bytes(16))
    (tmp_path / "in" / "00.parquet").write_bytes(b"the table beside a tar")
    expected = [("00.tar/k1.jpg", "one"), *((f"01.tar/{long}.png", text) for text in "ab"), ("01.tar/./k3.JPG", "c")]
    sources = [
        open_source(tmp_path / "in"),
        open_source(f"{tmp_path}/in/*.tar"),
        open_source(f"{tmp_path}/in/{{00..01}}.tar"),
    ]
    for source in sources:
        assert pairs(source) == expected
        assert read_pictures(source) == {"00.tar/k1.jpg": b"1", f"01.tar/{long}.png": b"2", "01.tar/./k3.JPG": b"3"}
    assert len({source.identity() for source in sources}) == 1
    assert sources[0].extra_columns() == {"url": pyarrow.string(), "source_key": pyarrow.string(), "n": pyarrow.int64()}
    assert json.loads(next(sources[0].rows()).extra) == {"url": "u", "source_key": "k", "n": 1}


def test_keys_with_dots_and_keys_that_come_again(write_tar):
    path = write_tar(
        "t.tar",
        [
            *[("x.com_1.jpg", b"1"), ("x.com_1.txt", b"one"), ("x.com_2.jpg", b"2"), ("x.com_2.txt", b"two")],
            *[("k.jpg", b"3"), ("k.txt", b"three"), ("k.jpg", b"4"), ("k.txt", b"four")],
            *[("a.jpg", b"5"), ("a.mask.png", b"M"), ("a.txt", b"five")],
            *[("b.input.jpg", b"6"), ("b.target.txt", b"six")],
            *[("k.jpg", b"7"), ("k.txt", b"seven")],
            *[("two.jpg", b"8"), ("two.png", b"9"), ("two.txt", b"which")],
            *[("k.jpg#2.jpg", b"8"), ("k.jpg#2.txt", b"eight")],
        ],
    )
    source = open_source(path)
    assert pairs(source) == [
        ("t.tar/x.com_1.jpg", "one"),
        ("t.tar/x.com_2.jpg", "two"),
        ("t.tar/k.jpg", "three"),
        ("t.tar/k.jpg#2", "four"),
        ("t.tar/a.jpg", "five"),
        ("t.tar/b.input.jpg", "six"),
        ("t.tar/k.jpg#3", "seven"),
        ("t.tar/two.jpg", "several pictures of one key: name an extension with --image-column"),
        ("t.tar/k.jpg#2.jpg", "eight"),
    ]
    assert [*read_pictures(source).values()] == [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"]
    assert read_pictures(open_source(path, image_column="png"))["t.tar/two.png"] == b"9"


def test_thousands_of_keys_with_one_beginning_are_not_mixed_up(write_tar):
    members = [(f"x.{number}.{end}", b"%d" % number) for number in range(1500) for end in ("jpg", "txt")]
    source = open_source(write_tar("t.tar", members))
    assert [(row.caption, source.read_embedded(row.place)) for row in source.rows()] == [
        (str(number), b"%d" % number) for number in range(1500)
    ]


def test_hostile_members_are_names_or_refusals(write_tar):
    members = [
        ("../../etc/passwd.jpg", b"1"),
        ("../../etc/passwd.txt", b"one"),
        ("/abs.jpg", b"2"),
        ("/abs.txt", b"two"),
        ("link.jpg", b"", tarfile.SYMTYPE),
        ("hard.jpg", b"", tarfile.LNKTYPE),
        ("null.jpg", b"", tarfile.CHRTYPE),
        ("pipe.jpg", b"", tarfile.FIFOTYPE),
        ("folder.jpg", b"", tarfile.DIRTYPE),
        ("nul.jpg", b"3"),
        ("nul.txt", b"a\0b"),
        ("big.jpg", b"4"),
        ("big.txt", b"x" * 1_000_000),
        ("huge.jpg", b"5"),
        ("huge.txt", b"x" * (4 * 2**20 + 1)),
        ("bad.jpg", b"6"),
        ("bad.txt", b"caf\xe9"),
        ("json.jpg", b"7"),
        ("json.json", b"{broken"),
        ("alone.txt", b"no picture"),
        ("bare.jpg", b"8"),
        ("README", b"no sample"),
    ]
    source = open_source(write_tar("t.tar", members))
    assert pairs(source) == [
        ("t.tar/../../etc/passwd.jpg", "one"),
        ("t.tar/link.jpg", "link in a tar"),
        ("t.tar/hard.jpg", "link in a tar"),
        ("t.tar/null.jpg", "device in a tar"),
        ("t.tar/pipe.jpg", "device in a tar"),
        ("t.tar//abs.jpg", "two"),
        ("t.tar/nul.jpg", "caption with a NUL character"),
        ("t.tar/big.jpg", "caption of more than 100000 characters"),
        ("t.tar/huge.jpg", "caption file of more than 4194304 bytes"),
        ("t.tar/bad.jpg", "caption that is not UTF-8 text"),
        ("t.tar/json.jpg", "no caption"),
        ("t.tar/alone", "captions without a picture"),
        ("t.tar/bare.jpg", "no caption"),
    ]
    assert read_pictures(source)["t.tar//abs.jpg"] == b"2"


def test_a_damaged_tar_is_a_refused_row_and_the_next_one_is_read(write_tar, tmp_path):
    for number in range(3):
        write_tar(f"in/{number}.tar", [(f"{k}.{end}", b"%d" % k * 700) for k in range(3) for end in ("jpg", "txt")])
    os.truncate(tmp_path / "in" / "0.tar", 512 + 1024 + 512 + 1024 + 512 + 100)
    (tmp_path / "in" / "1.tar").write_bytes(b"")
    rows = list(open_source(tmp_path / "in").rows())
    refused = "tar that is damaged or cut short from here on"
    assert [(row.image, row.refusal) for row in rows] == [
        ("0.tar/0.jpg", ""),
        ("0.tar/byte 3072", refused),
        ("1.tar/byte 0", refused),
        *((f"2.tar/{k}.jpg", "") for k in range(3)),
    ]
    source = open_source(tmp_path / "in")
    os.truncate(tmp_path / "in" / "2.tar", 600)
    with pytest.raises(PictureError, match="cut short"):
        source.read_embedded(rows[-1].place)
    refuses(gzip_file(tmp_path / "in" / "2.tar"), "pictures inside gzip cannot be reached")


def gzip_file(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_the_identity_of_tars_is_of_names_sizes_and_captions(write_tar):
    def identify(picture: bytes, caption: bytes, name: str = "t.tar") -> str:
        return open_source(write_tar(name, [("k.jpg", picture), ("k.txt", caption)])).identity()

    first = identify(b"A", b"x")
    assert first == identify(b"B", b"x")
    assert len({first, identify(b"AA", b"x"), identify(b"A", b"y"), identify(b"A", b"x", "u.tar")}) == 4


# Parquet and Arrow

PICTURES = [b"picture %d" % number * 50 for number in range(40)]
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def make_table(shape: str, start: int = 0, stop: int = 40) -> pyarrow.Table:
    pictures = PICTURES[start:stop]
    images = pyarrow.array([{"bytes": data, "path": f"{data[8:10]}.jpg"} for data in pictures], STRUCT)
    columns = {
        "id": pyarrow.array(range(start, stop), pyarrow.int32()),
        "image": images if shape == "struct" else pyarrow.array(pictures, pyarrow.large_binary()),
        "filename": [f"{number}.jpg" for number in range(start, stop)],
        "captions": [[f"one {number}", f"two {number}"] for number in range(start, stop)],
        "embedding": pyarrow.array([b"x"] * len(pictures)),
    }
    return pyarrow.table(columns)


def write_dataset(path: Path, kind: str, table: pyarrow.Table) -> None:
    path.mkdir(exist_ok=True)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path / "data-0.parquet", row_group_size=7)
        return
    with pyarrow.ipc.new_stream(path / "data-0.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "f"}))
    (path / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("shape", ["struct", "bytes"])
def test_embedded_pictures_are_found_in_any_order_and_after_pickling(tmp_path, kind, shape):
    write_dataset(tmp_path / "in", kind, make_table(shape))
    source = open_source(tmp_path / "in")
    assert source.embedded and source.extra_columns() == {"id": pyarrow.int64(), "filename": pyarrow.string()}
    rows = list(source.rows())
    assert [row.caption for row in rows] == [f"{word} {number}" for number in range(40) for word in ("one", "two")]
    assert rows[34].image == f"data-0.{kind}/17" and json.loads(rows[34].extra) == {"id": 17, "filename": "17.jpg"}
    places = [row.place for row in rows[::2]]
    assert [source.read_embedded(place) for place in places] == PICTURES
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read_embedded(place) for place in reversed(places)] == PICTURES[::-1]
    moved = open_source(tmp_path / "in", image_column="filename", caption_column="captions")
    assert not moved.embedded and next(moved.rows())[:2] == ("0.jpg", "one 0")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_identity_of_columns_is_of_everything_but_the_bytes_of_pictures(tmp_path, kind):
    def identify(name: str, **changed) -> str:
        table = make_table("struct")
        for column, values in changed.items():
            table = table.set_column(table.column_names.index(column), column, values)
        write_dataset(tmp_path / name, kind, table)
        return open_source(tmp_path / name).identity()

    images = make_table("struct").column("image").to_pylist()
    captions = make_table("struct").column("captions").to_pylist()
    first = identify("a")
    assert first == identify("b")
    longer = pyarrow.array([{**images[0], "bytes": b"x"}, *images[1:]], STRUCT)
    renamed = pyarrow.array([{**images[0], "path": "xx.jpg"}, *images[1:]], STRUCT)
    others = {
        identify("c", captions=pyarrow.array([["one 0", "two x"], *captions[1:]])),
        identify("d", image=longer),
        identify("e", image=renamed),
    }
    assert len(others | {first}) == 4


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pictures_that_are_not_embedded_are_fetched_by_their_path(tmp_path, kind):
    images = [{"bytes": b"A", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None, {"bytes": None, "path": None}]
    table = pyarrow.table({"image": pyarrow.array(images + [images[1]] * 7, STRUCT), "text": ["x"] * 11})
    write_dataset(tmp_path / "in", kind, table)
    source = open_source(tmp_path / "in")
    found = [(row.image, row.refusal, bool(row.place)) for row in source.rows()]
    label = f"data-0.{kind}"
    assert found[:4] == [
        (f"{label}/0", "", True),
        ("b.jpg", "", False),
        (f"{label}/2", "no picture", False),
        (f"{label}/3", "no picture", False),
    ]
    assert found[4:] == [("b.jpg", "", False)] * 7
    assert source.read_embedded(next(source.rows()).place) == b"A"
    with pytest.raises(PictureError, match="no picture"):
        source.read_embedded("0/0/1")


def test_a_parquet_table_of_addresses(tmp_path):
    import datetime
    import decimal

    table = pyarrow.table(
        {
            "URL": ["http://x/1", None, "http://x/3"],
            "TEXT": pyarrow.array(["one", "two", None]).dictionary_encode(),
            "similarity": pyarrow.array([0.5, float("nan"), 1.0], pyarrow.float32()),
            "hash": pyarrow.array([2**64 - 1, 1, 2], pyarrow.uint64()),
            "day": [datetime.datetime(2020, 1, 2, 3)] * 3,
            "price": [decimal.Decimal("1.50")] * 3,
            "tags": [["a", "b"], None, []],
            "nothing": pyarrow.nulls(3),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert pairs(source) == [("http://x/1", "one"), ("row 2", "empty image name"), ("http://x/3", "empty caption")]
    types = source.extra_columns()
    assert {name: str(kind) for name, kind in types.items() if kind != pyarrow.string()} == {"similarity": "double"}
    assert json.loads(next(source.rows()).extra) == {
        "similarity": 0.5,
        "hash": str(2**64 - 1),
        "day": "2020-01-02 03:00:00.000000",
        "price": "1.50",
        "tags": '["a", "b"]',
    }
    pyarrow.parquet.write_table(table.set_column(1, "TEXT", [["one", "tw\u00f6", "x"]]), tmp_path / "u.parquet")
    assert open_source(tmp_path / "u.parquet").identity() != source.identity()


def test_text_in_parquet_that_is_not_utf8_is_a_refused_row(tmp_path):
    captions = pyarrow.array([b"good", b"caf\xe9", "caf\u00e9".encode()]).view(pyarrow.string())
    table = pyarrow.table({"url": ["a", "b", "c"], "caption": captions, "note": captions})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    rows = list(open_source(tmp_path / "t.parquet").rows())
    assert [row.refusal for row in rows] == ["", "caption that is not UTF-8 text", ""]
    assert [json.loads(row.extra or "{}").get("note") for row in rows] == ["good", None, "caf\u00e9"]


def test_files_of_one_dataset_may_differ_in_their_other_columns_only(tmp_path):
    def write(number: int, **columns) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"part-{number}.parquet")

    write(0, url=["a"], caption=["x"], score=[1], only=["o"])
    write(1, caption=["y"], url=["b"], score=[0.5])
    source = open_source(tmp_path)
    assert source.extra_columns() == {"score": pyarrow.float64(), "only": pyarrow.string()}
    assert [json.loads(row.extra) for row in source.rows()] == [{"score": 1.0, "only": "o"}, {"score": 0.5}]
    write(1, caption=["y"], address=["b"])
    refuses(tmp_path, "part-1.parquet: no column 'url', which ")
    write(1, caption=["y"], url=[b"b"])
    refuses(tmp_path, "the column 'url' is binary, unlike that of ")


def test_splits_of_one_dataset_are_not_mixed(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pyarrow.parquet.write_table(pyarrow.table({"url": [name], "caption": ["x"]}), tmp_path / f"{name}.parquet")
    refuses(tmp_path, "holds the splits test, train. Give one, as with '")
    assert len(pairs(open_source(f"{tmp_path}/train-*.parquet"))) == 2
    (tmp_path / "saved" / "train").mkdir(parents=True)
    write_dataset(tmp_path / "saved" / "train", "arrow", make_table("struct"))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    refuses(tmp_path / "saved", f"holds the splits train. Give one of them, such as {tmp_path}/saved/train")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_are_not_clear_or_of_a_wrong_type_are_refused(tmp_path, kind):
    write_dataset(tmp_path / "in", kind, pyarrow.table({"url": ["a"], "image_url": ["b"], "text": [1], "n": [1]}))
    refuses(tmp_path / "in", "the image could be any of url, image_url. The columns are: url, image_url, text, n")
    refuses(tmp_path / "in", "no column is known to hold the caption", image_column="url")
    refuses(tmp_path / "in", "'text' of int64 holds no texts", image_column="url", caption_column="text")
    refuses(tmp_path / "in", "'n' of int64 holds neither pictures nor names", image_column="n", caption_column="url")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_truncated_columns_are_one_clear_error(tmp_path, kind):
    write_dataset(tmp_path / "in", kind, make_table("bytes"))
    path = tmp_path / "in" / f"data-0.{kind}"
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 400):
        path.write_bytes(whole[:length])
        refuses(tmp_path / "in", "truncated or damaged")


def test_damage_among_the_pictures_of_parquet_fails_those_rows_only(tmp_path):
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"image": PICTURES, "caption": ["x"] * 40})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="gzip", use_dictionary=False)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    source = open_source(path)
    results = []
    for row in source.rows():
        try:
            results.append(source.read_embedded(row.place))
        except PictureError as error:
            results.append(error.reason)
    assert results == [*PICTURES[:10], *["damaged container"] * 10, *PICTURES[20:]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4999), st.integers(0, 255)), min_size=1, max_size=5), st.data())
def test_damaged_arrow_is_read_or_refused(tmp_path_factory, changes, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    write_dataset(folder, "arrow", make_table("struct"))
    path = folder / "data-0.arrow"
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        source = open_source(folder)
        for row in source.rows():
            if row.place:
                source.read_embedded(row.place)
    except (UserError, PictureError) as error:
        assert str(error)


def test_planning_and_reading_do_not_hold_a_row_group(tmp_path):
    """One row group with 96 MiB of pictures and a window of 32 MiB: the peak is measured in a process of its own."""
    pictures = [os.urandom(2**15) for _ in range(64)]
    table = pyarrow.table({"image": [pictures[k % 64] for k in range(3072)], "caption": ["x"] * 3072})
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 8}
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", **options)
    code = """
import pyarrow, sys
from data_tools.sources import open_source
source = open_source(sys.argv[1])
places = [row.place for row in source.rows()]
print(len(places), pyarrow.default_memory_pool().max_memory())
print(sum(len(source.read_embedded(place)) for place in places), pyarrow.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "t.parquet")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    (rows, planning), (read, reading) = (map(int, line.split()) for line in output.splitlines())
    assert (rows, read) == (3072, 3072 * 2**15)
    assert planning < 8 * 2**20 and reading < 72 * 2**20
