"""The preview page: whole in one file, nothing of a caption becomes mark-up, and the same bytes again."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.preview import _even_bins, _ratio_bins, _render_histogram, write_preview
from data_tools.shards import Manifest, write_shard

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' </style> <img src=x onerror=alert(2)>"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The page's elements, attributes and text; fails for elements that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], Counter(), [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path, write_table, capsys):
    table, images = write_table(12, size=400)
    table.write_text(table.read_text() + f"picture 0.jpg\t{HOSTILE}\nnone.jpg\tx\n")
    build_shards(table, tmp_path / "out", images, samples_per_shard=5, processes=1)
    write_preview(tmp_path / "out", tmp_path / "page.html", count=50)
    return Page((tmp_path / "page.html").read_text())


def test_the_page_needs_and_runs_nothing(page):
    assert not {"script", "link", "iframe", "object", "form"} & page.tags.keys()
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("href", "srcset", "action")
        assert name != "src" or value.startswith("data:image/jpeg;base64,")
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_the_page_shows_every_sample(page):
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 12
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        assert image.format == "JPEG" and max(image.size) <= 320
    text = "".join(page.text)
    assert HOSTILE in text
    for number in range(12):
        assert f"caption {number} one" in text and f"picture {number}.jpg" in text
    assert "000010004" in text and "missing picture" in text and page.tags["svg"] == 4
    assert "12 of 12 samples" in re.sub(r"\s+", " ", text)


def test_the_same_bytes_again_and_other_samples_by_another_seed(tmp_path, page):
    write_preview(tmp_path / "out", tmp_path / "again.html", count=50)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()
    shown = []
    for seed in (0, 1, 0):
        write_preview(tmp_path / "out", tmp_path / "few.html", count=4, seed=seed)
        text = "".join(Page((tmp_path / "few.html").read_text()).text)
        shown.append(re.findall(r"picture \d+\.jpg", text))
    assert len(shown[0]) == 4 and shown[0] == shown[2] != shown[1]


def test_a_broken_picture_and_a_broken_json_are_shown_as_such(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    import pyarrow.parquet

    with write_shard(folder, "00000.tar") as writer:
        writer.add("a", {"jpg": b"not a picture", "txt": b"bad <b>bytes</b> \xff", "json": b"[" * 100_000})
        writer.add("b", {"txt": b"alone", "json": json.dumps({"captions": [1, None], "source": 5}).encode()})
        writer.add("c", {"json": b"{}"})
    rows = [{"key": key, "status": "success"} for key in "abc"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    Manifest.of_shards(folder, [writer.info]).write()
    write_preview(folder, tmp_path / "page.html")
    text = "".join(Page((tmp_path / "page.html").read_text()).text)
    assert "cannot identify image file" in text and "bad <b>bytes</b> \ufffd" in text
    assert "no picture" in text and "alone" in text and "(no caption)" in text


def test_mistakes_are_one_clear_line(tmp_path, page):
    with pytest.raises(UserError, match="--count 0: give at least 1"):
        write_preview(tmp_path / "out", tmp_path / "page.html", count=0)
    with pytest.raises(UserError, match="ends in .html"):
        write_preview(tmp_path / "out", tmp_path / "table.tsv")
    assert (tmp_path / "table.tsv").read_text().startswith("filename\tcaption")


@given(st.dictionaries(st.integers(0, 10**6), st.integers(1, 10**6), min_size=1, max_size=60))
def test_the_bars_hold_every_value(counts):
    figure = _render_histogram("sizes", counts, _even_bins, str)
    shown = sum(int(number.replace(",", "")) for number in re.findall(r": ([\d,]+)</title>", figure))
    assert shown == sum(counts.values())
    assert len(_even_bins(counts)) <= 25
    Page(figure)


@given(st.dictionaries(st.floats(0.001, 1000), st.integers(1, 10**6), min_size=1, max_size=60))
def test_the_bars_hold_every_ratio(counts):
    bins = _ratio_bins(counts)
    assert 1 <= len(bins) <= 26 and all(start < end for start, end in bins)
    figure = _render_histogram("aspect", counts, _ratio_bins, lambda value: f"{value:.2f}")
    assert sum(int(number.replace(",", "")) for number in re.findall(r": ([\d,]+)</title>", figure)) == sum(
        counts.values()
    )


def test_one_to_one_lies_in_the_middle_of_a_bar():
    bins = _ratio_bins({0.5: 10, 1.0: 10, 2.0: 10})
    assert sum(start < 0.999 and end > 1.001 for start, end in bins) == 1
