"""Views: what an expression selects, where it gets its columns from, and what it cannot reach."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from tending import make_dataset

from data_tools.errors import UserError
from data_tools.shards import Manifest, ShardReader
from data_tools.view import make_view


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "data")  # words 1..7, widths 40, 48, ... 88; keys 000000001..4 and 000010001..3
    return tmp_path / "data"


def keys_of(manifest: Manifest) -> list[str]:
    reader = ShardReader(manifest)
    keys = [reader.read(number).key for number in range(len(reader))]
    rows = [
        key
        for number in range(len(manifest.shards))
        for key in manifest.read_sidecar(number, ["key"])["key"].to_pylist()
    ]
    assert rows == keys
    return keys


FIRST, SECOND = [f"00000000{n}" for n in (1, 2, 3, 4)], [f"00001000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("width >= 56 and caption_words between 3 and 5 and status = 'success'", [*FIRST[2:], SECOND[0]]),
        ("status = 'ok' and width < 48", FIRST[:1]),
        ("status != 'ok' or width < 48", FIRST[:1]),
        ("width < 48 and STATUS in ('x', 'ok') and status not in ('failure') and caption <> 'ok'", FIRST[:1]),
        ("captions_count = 2", [FIRST[1], FIRST[3], SECOND[1]]),
        ("shard = '00001.tar' and place <> 1", [SECOND[0], SECOND[2]]),
        ("aspect >= 2", SECOND[1:]),
        ("caption_chars = length(caption) and licence = 'cc-1'", [FIRST[1], FIRST[3], SECOND[1]]),
        ("list_contains(captions, 'another') and key > '00001' -- a remark", SECOND[1:2]),
        ("case when width > 80 then true end", SECOND[2:]),
        ("key in (select key from samples where width < 48)", FIRST[:1]),
    ],
)
def test_an_expression_selects_samples(folder, tmp_path, where, keys):
    if "from samples" in where:
        make_view(folder, tmp_path / "view", where)  # of this shard's rows only; it harms nobody
        assert keys_of(Manifest.load(tmp_path / "view")) == keys
        return
    before = sorted((name, (folder / name).read_bytes()) for name in os.listdir(folder))
    view = make_view(folder, tmp_path / "view", where)
    assert keys_of(view) == keys
    assert view.captions == sum(1 + (place % 2) for place, key in enumerate([*FIRST, *SECOND]) if key in keys)
    assert view.options["where"] == where
    assert sorted((name, (folder / name).read_bytes()) for name in os.listdir(folder)) == before


def test_a_view_of_a_view_and_of_a_quarantined_dataset(folder, tmp_path):
    make_view(folder, tmp_path / "a", "width > 40")
    view = make_view(tmp_path / "a", tmp_path / "b", "width < 72")
    assert keys_of(view) == FIRST[1:]
    (folder / "quarantine.json").write_text('{"00000.tar": {"2": "damaged"}}')
    assert keys_of(Manifest.load(tmp_path / "b")) == [FIRST[1], FIRST[3]]
    assert keys_of(make_view(folder, tmp_path / "c", "true")) == [FIRST[0], FIRST[1], FIRST[3], *SECOND]


def write_scores(path, **columns) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_joined_files_bring_columns_by_key_or_by_hash(folder, tmp_path):
    rows = [
        row for number in range(2) for row in Manifest.load(folder).read_sidecar(number, ["key", "sha256"]).to_pylist()
    ]
    keys = [row["key"] for row in rows]
    scores = write_scores(tmp_path / "clip scores.parquet", key=keys[::-1][:6], similarity=[0.1 * n for n in range(6)])
    assert keys_of(make_view(folder, tmp_path / "a", "similarity > 0.25", [scores])) == keys[1:4]
    hashes = write_scores(tmp_path / "b.parquet", sha256=[rows[5]["sha256"]], width=pyarrow.array([7], pyarrow.int64()))
    assert keys_of(make_view(folder, tmp_path / "b", "b_width = 7 and width = 80", [hashes])) == keys[5:6]
    both = [scores, write_scores(tmp_path / "two.parquet", key=keys, similarity=[1.0] * 7, place=[5] * 7)]
    where = "clip_scores_similarity > 0.25 and two_similarity = 1 and two_place = 5 and place < 4"
    assert keys_of(make_view(folder, tmp_path / "c", where, both)) == keys[1:4]
    with pytest.raises(
        UserError, match=r"'similarity' is in several .* Write clip_scores_similarity or two_similarity\."
    ):
        make_view(folder, tmp_path / "d", "similarity > 0", both)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"name": ["a"], "x": [1]}, r"has neither a column key nor sha256 to join by. Its columns are: name, x"),
        ({"key": ["a", "b", "a"], "x": [1, 2, 3]}, r"key a has 2 rows. Give a file with one row for each key"),
    ],
)
def test_a_file_that_cannot_be_joined_is_refused(folder, tmp_path, columns, text):
    file = write_scores(tmp_path / "s.parquet", **columns)
    with pytest.raises(UserError, match=text):
        make_view(folder, tmp_path / "view", "true", [file])
    (tmp_path / "s.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as parquet"):
        make_view(folder, tmp_path / "view", "true", [file])
    with pytest.raises(UserError, match="no such file"):
        make_view(folder, tmp_path / "view", "true", [str(tmp_path / "none.parquet")])
    assert not (tmp_path / "view").exists()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("widht > 3", r"no column 'widht'\. Did you mean 'width'\? The columns are: key, status, .*caption_words"),
        ("width >", "syntax error"),
        (" ", "the expression is empty"),
        ("caption", "Could not convert string"),
        ("width > 1) -- ", "syntax error"),
        ("width > (select count(*) from read_csv('/etc/passwd'))", "Permission Error: Cannot access file"),
        ("width > (select count(*) from '/etc/passwd')", "does not exist"),
        ("width > (select count(*) from 'http://127.0.0.1:9/x.parquet')", "Permission Error: Cannot access file"),
        ("width > (select count(*) from manifest)", "does not exist"),
        (
            "true) AS BOOLEAN) AS keep FROM samples; COPY samples TO 'stolen.csv'; SELECT cast((true",
            "not one expression|Permis",
        ),
        (
            "true) AS BOOLEAN) AS keep FROM samples; SET enable_external_access = true; SELECT CAST((true",
            "one expression",
        ),
        ("true) AS BOOLEAN) AS keep FROM samples UNION ALL SELECT 9 AS number, CAST((true", "not one expression"),
        ("true) AS BOOLEAN) AS keep FROM samples UNION ALL SELECT 99, CAST((true", "not one expression"),
        ("getenv('HOME') <> ''", "does not exist"),
    ],
)
def test_a_bad_expression_is_one_line_and_reaches_nothing(folder, tmp_path, where, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as caught:
        make_view(folder, tmp_path / "view", where)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_no_sample_left_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match=r'not one of 7 samples is left by --where "width > 1000"'):
        make_view(folder, tmp_path / "view", "width > 1000")
    assert not (tmp_path / "view").exists()


def test_a_used_folder_is_left_alone(folder, tmp_path):
    make_view(folder, tmp_path / "view", "width > 48")
    with pytest.raises(UserError, match="holds a view already. Give another folder, or --restart"):
        make_view(folder, tmp_path / "view", "width > 56")
    assert Manifest.load(tmp_path / "view").samples == 5
    assert make_view(folder, tmp_path / "view", "width > 56", restart=True).samples == 4
    with pytest.raises(UserError, match="is the dataset itself"):
        make_view(folder, folder, "true", restart=True)
    make_dataset(tmp_path / "other")
    with pytest.raises(UserError, match="holds a dataset that is no view"):
        make_view(folder, tmp_path / "other", "true", restart=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "letter.txt").touch()
    with pytest.raises(UserError, match="holds files but no view"):
        make_view(folder, tmp_path / "files", "true", restart=True)
    (tmp_path / "view" / "manifest.json").unlink()  # as a run that was killed leaves it
    assert make_view(folder, tmp_path / "view", "width > 64").samples == 3


def test_the_command(folder, tmp_path, run_data_tools):
    run = run_data_tools("view", folder, tmp_path / "view", "--where", "width >= 64")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].endswith("view: 4 of 7 samples remain (57.1%), 6 captions")
    assert run.stdout.splitlines()[1:] == ["  00000.tar  1 of 4", "  00001.tar  3 of 3"]
    run = run_data_tools("view", folder, tmp_path / "view", "--where", "width >= 72", "--restart", "--json")
    assert json.loads(run.stdout)["shards"] == {"00000.tar": 0, "00001.tar": 3}
    run = run_data_tools("view", folder, tmp_path / "other", "--where", "wide > 2")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "example:\n  python -m data_tools view" in run_data_tools("view", "--help").stdout
