"""What `info` counts, and that it fits a terminal and the memory."""

import json
import tracemalloc
import unicodedata
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.build import SIDECAR_FIELDS, build_shards
from data_tools.errors import UserError
from data_tools.info import find_quantile, gather_facts, name_script, print_info
from data_tools.shards import Manifest, write_shard


def test_info_as_json_tells_the_truth(tmp_path, write_table, capsys):
    table, images = write_table(4)
    table.write_text(table.read_text() + "none.jpg\tx\npicture 0.jpg\t两只狗 и кошка\npicture 1.jpg\t42 !\n")
    build_shards(table, tmp_path / "out", images, samples_per_shard=2, processes=1)
    capsys.readouterr()
    print_info(tmp_path / "out", json=True)
    info = json.loads(capsys.readouterr().out)
    manifest = Manifest.load(tmp_path / "out")
    assert (info["samples"], info["captions"], info["failures"]) == (4, 10, 1)
    assert info["failures_by_reason"] == {"missing picture": 1}
    assert info["captions_per_image"] == {"2": 2, "3": 2}
    assert info["caption_words"] == {"min": 2, "median": 3, "p95": 3, "max": 3}
    assert info["caption_characters"] == {"min": 4, "median": 13, "p95": 13, "max": 13}
    assert info["letters_by_script"] == {"Latin": 8 * len("captionone"), "Cyrillic": 6, "Han": 3}
    assert info["height"] == {"min": 64, "median": 65, "p95": 67, "max": 67}
    assert info["pixels"] == 64 * (64 + 65 + 66 + 67)
    assert info["fingerprint"] == manifest.fingerprint and info["tar_bytes"] == manifest.bytes
    assert info["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_long_lines_are_wrapped_and_wide_letters_counted_twice(tmp_path, write_table, capsys):
    table, images = write_table(30)
    extra = [f"picture {number}.jpg\t{'狗' * 60}" for number in range(30) for _ in range(number)]
    table.write_text(table.read_text() + "\n".join(extra) + "\n")
    build_shards(table, tmp_path / "out", images, processes=1)
    capsys.readouterr()
    print_info(tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()[1:]

    def count_columns(line):
        return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)

    assert all(count_columns(line) <= 80 for line in lines)
    start = next(place for place, line in enumerate(lines) if line.startswith("captions"))
    assert lines[start + 1].startswith(" " * 13) and "31: 1)" in " ".join(lines[start : start + 6])


@pytest.mark.parametrize(
    ("letters", "script"),
    [
        ("aZéøﬁ", "Latin"),
        ("狗𠀀", "Han"),
        ("Жя", "Cyrillic"),
        ("Ωα", "Greek"),
        ("한", "Hangul"),
        ("ひ", "Hiragana"),
        ("カｶ", "Katakana"),
        ("ａ", "Latin"),
        ("ع", "Arabic"),
        ("ह", "Devanagari"),
    ],
)
def test_scripts(letters, script):
    assert {name_script(letter) for letter in letters} == {script}


@given(st.characters())
def test_every_character_has_some_script(character):
    assert name_script(character)


@given(st.lists(st.integers(0, 50), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_those_of_the_sorted_values(values, share):
    expected = np.quantile(values, share, method="inverted_cdf")
    assert find_quantile(Counter(values), share) == expected


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Five times the rows, the same peak: the sidecars are streamed."""
    peaks = []
    for shards in (2, 10):
        folder = tmp_path / str(shards)
        folder.mkdir()
        infos = []
        for number in range(shards):
            rows = [
                {
                    "key": f"{number:05d}{place:04d}",
                    "status": "success",
                    "captions": [f"a caption of {number} and {place}" + " and so on" * 5],
                    "width": 64 + place % 50,
                    "height": 64,
                }
                for place in range(1100)
            ]
            table = pyarrow.Table.from_pylist(rows, pyarrow.schema(SIDECAR_FIELDS))
            pyarrow.parquet.write_table(table, folder / f"{number:05d}.parquet")
            with write_shard(folder, f"{number:05d}.tar") as writer:
                for row in rows:
                    writer.add(row["key"], {"txt": b"x"})
            infos.append(writer.info)
        manifest = Manifest.of_shards(folder, infos)
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        facts = gather_facts(manifest)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert facts.captions_per_image == {1: 1100 * shards}
        assert pyarrow.total_allocated_bytes() - before < 2**20
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_a_missing_or_broken_sidecar_is_one_clear_line(tmp_path, write_table):
    table, images = write_table(2)
    build_shards(table, tmp_path / "out", images, processes=1)
    (tmp_path / "out" / "00000.parquet").write_bytes(b"broken")
    with pytest.raises(UserError, match="00000.parquet: not readable"):
        print_info(tmp_path / "out")
    (tmp_path / "out" / "00000.parquet").unlink()
    with pytest.raises(UserError, match="00000.parquet: no such sidecar"):
        print_info(tmp_path / "out")
