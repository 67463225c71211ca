"""New shards of old samples: every picture once, the same bytes for any processes and after any interruption."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tending import encode_noise, make_dataset

from data_tools.errors import UserError
from data_tools.index import index_tars
from data_tools.reshard import count_drawn, cut_shards, order_samples, reshard
from data_tools.shards import Manifest, ShardReader
from data_tools.verify import verify_dataset
from data_tools.view import make_view


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two datasets of 7 and 5 samples; the second has no column `licence`."""
    root = tmp_path_factory.mktemp("sources")
    make_dataset(root / "a", (4, 0, 3), seed=0)
    make_dataset(root / "b", (5,), seed=1, extra=False)
    return root


def read_samples(place) -> list[dict[str, bytes]]:
    reader = ShardReader(Manifest.load(place))
    return [reader.read(number).fields for number in range(len(reader))]


def hash_pictures(place) -> list[str]:
    return [hashlib.sha256(fields["jpg"]).hexdigest() for fields in read_samples(place)]


def read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def read_rows(place) -> list[dict]:
    manifest = Manifest.load(place)
    return [row for number in range(len(manifest.shards)) for row in manifest.read_sidecar(number).to_pylist()]


def test_datasets_are_merged_in_order(sources, tmp_path):
    before = {name: read_files(sources / name) for name in "ab"}
    manifest = reshard([sources / "a", sources / "b"], tmp_path / "out", samples_per_shard=5, processes=1)
    assert before == {name: read_files(sources / name) for name in "ab"}
    assert [shard.samples for shard in manifest.shards] == [5, 5, 2]
    assert hash_pictures(tmp_path / "out") == hash_pictures(sources / "a") + hash_pictures(sources / "b")
    assert (manifest.failures, manifest.captions) == (0, 10 + 7)
    assert verify_dataset(tmp_path / "out", decode=True, processes=1)
    rows, old = read_rows(tmp_path / "out"), read_rows(sources / "a") + read_rows(sources / "b")
    keys = [f"{number // 5:05d}{number % 5:04d}" for number in range(12)]
    assert [row["key"] for row in rows] == keys
    assert [row["original_key"] for row in rows] == [row["key"] for row in old]
    for row, one in zip(rows, old, strict=True):
        for name in ("caption", "captions", "source", "width", "height", "original_width", "sha256"):
            assert row[name] == one[name]
        assert row["licence"] == one.get("licence")
    for key, fields, row in zip(keys, read_samples(tmp_path / "out"), rows, strict=True):
        content = json.loads(fields["json"])
        assert (content["key"], content["original_key"], content["captions"]) == (
            key,
            row["original_key"],
            row["captions"],
        )
        assert content.get("licence") == row["licence"]
        assert fields["txt"].decode() == row["caption"]
    assert sorted(os.listdir(tmp_path / "out"))[-5:] == ["00002_stats.json", "build.json", "checksums.json", "manifest.json", "sizes.json"]  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pictures_are_preserved_whatever_is_asked_for(sources, tmp_path_factory, data):
    places = data.draw(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3))
    total = sum({"a": 7, "b": 5}[name] for name in places)
    size = data.draw(st.sampled_from(["samples_per_shard", "shard_bytes"]))
    options = {
        size: data.draw(st.integers(1, 8) if size == "samples_per_shard" else st.integers(1, 40_000)),
        "shuffle": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 3)),
        "sample": data.draw(st.one_of(st.none(), st.integers(1, total).map(str))),
    }
    root = tmp_path_factory.mktemp("out")
    processes = data.draw(st.sampled_from([1, 1, 1, 2]))
    manifest = reshard([sources / name for name in places], root / "out", processes=processes, **options)
    drawn = int(options["sample"] or total)
    assert manifest.samples == drawn
    old = [digest for name in places for digest in hash_pictures(sources / name)]
    new = hash_pictures(root / "out")
    assert len(new) == drawn and not Counter(new) - Counter(old)
    if not options["shuffle"]:  # the order is kept: new is a subsequence of old
        rest = iter(old)
        assert all(digest in rest for digest in new)
    if size == "samples_per_shard":
        assert max(shard.samples for shard in manifest.shards) <= options[size]
    assert len({row["key"] for row in read_rows(root / "out")}) == drawn
    assert verify_dataset(root / "out", processes=1)


def test_bytes_do_not_depend_on_processes_and_seeds_differ(sources, tmp_path):
    places = [sources / "a", sources / "b"]
    options = {"samples_per_shard": 2, "shuffle": True}
    for processes in (1, 2):
        reshard(places, tmp_path / f"{processes}", processes=processes, seed=3, **options)
    assert read_files(tmp_path / "1") == read_files(tmp_path / "2")
    reshard(places, tmp_path / "other", processes=1, seed=4, **options)
    one, other = hash_pictures(tmp_path / "1"), hash_pictures(tmp_path / "other")
    assert one != other and sorted(one) == sorted(other)


def test_a_run_that_was_killed_ends_with_the_same_bytes(sources, tmp_path, start_data_tools):
    arguments = ["reshard", sources / "a", sources / "b", tmp_path / "out", "--samples-per-shard", 1, "--shuffle"]
    reshard([sources / "a", sources / "b"], tmp_path / "whole", samples_per_shard=1, shuffle=True, processes=1)
    wanted, out = read_files(tmp_path / "whole"), tmp_path / "out"
    seen = []
    for stage in ("plan.tmp", "build.json", "00000.tar", "00003_stats.json", "00008.parquet"):
        process = start_data_tools(*arguments, "--processes", 1)
        deadline = time.monotonic() + 60
        while not (out / stage).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append((out / "manifest.json").exists())
    assert not any(seen[:3])
    process = start_data_tools(*arguments, "--processes", 2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert read_files(out) == wanted


def test_a_finished_run_is_left_alone_and_another_is_refused(sources, tmp_path, capsys):
    root = shutil.copytree(sources, tmp_path / "sources")
    reshard([root / "a"], tmp_path / "out", samples_per_shard=3, processes=1)
    before = read_files(tmp_path / "out")
    capsys.readouterr()
    reshard([root / "a"], tmp_path / "out", samples_per_shard=3, processes=1)
    assert "finished already, with 7 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a build with samples_per_shard 3, not 4"):
        reshard([root / "a"], tmp_path / "out", samples_per_shard=4, processes=1)
    (root / "a" / "quarantine.json").write_text('{"00000.tar": {"1": "damaged"}}')
    with pytest.raises(UserError, match="holds a build with sources"):
        reshard([root / "a"], tmp_path / "out", samples_per_shard=3, processes=1)
    assert read_files(tmp_path / "out") == before
    manifest = reshard([root / "a"], tmp_path / "out", samples_per_shard=4, processes=1, restart=True)
    assert [shard.samples for shard in manifest.shards] == [4, 2]
    assert verify_dataset(tmp_path / "out", processes=1)
    with pytest.raises(UserError, match="is a source itself"):
        reshard([root / "a"], root / "a", processes=1, restart=True)
    with pytest.raises(UserError, match="holds what `build` wrote|holds files but no build"):
        reshard([root / "a"], root / "b", processes=1, restart=True)


def test_a_source_that_moves_during_an_interruption_is_planned_again(sources, tmp_path):
    root = shutil.copytree(sources, tmp_path / "one")
    reshard([root / "a"], tmp_path / "out", samples_per_shard=3, processes=1)
    wanted = read_files(tmp_path / "out")
    reshard([root / "a"], tmp_path / "again", samples_per_shard=3, processes=1)
    for name in ("manifest.json", "00001.tar", "00001_stats.json"):
        (tmp_path / "again" / name).unlink()
    root.rename(tmp_path / "two")
    reshard([tmp_path / "two" / "a"], tmp_path / "again", samples_per_shard=3, processes=1)
    assert read_files(tmp_path / "again") == wanted


def test_views_are_taken_as_datasets(sources, tmp_path):
    make_view(sources / "a", tmp_path / "view", "captions_count = 2")
    reshard([tmp_path / "view", tmp_path / "view"], tmp_path / "out", processes=1)
    assert hash_pictures(tmp_path / "out") == 2 * hash_pictures(tmp_path / "view")
    assert make_view(tmp_path / "out", tmp_path / "again", "original_key < '00001'").samples == 4


@pytest.mark.parametrize("sidecars", [False, True])
def test_tars_of_others_become_our_shards(sources, tmp_path, sidecars):
    import webdataset

    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{shard:05d}.tar")) as writer:
            for number in range(2):
                meta = {
                    "caption": f"text {number}",
                    "similarity": 0.5,
                    "url": f"u{number}",
                    "sha256": "of the original",
                }
                writer.write({"__key__": f"s{number}", "jpg": encode_noise(number), "json": meta, "seg.cls": b"7"})
    index_tars([str(tmp_path / "tars")], prefix_keys=True, sidecars=sidecars, processes=1)
    reshard([tmp_path / "tars", sources / "b"], tmp_path / "out", samples_per_shard=3, processes=1)
    rows, samples = read_rows(tmp_path / "out"), read_samples(tmp_path / "out")
    assert [row["original_key"] for row in rows[:4]] == ["00000_s0", "00000_s1", "00001_s0", "00001_s1"]
    assert [(row["captions"], row["width"], row["source"]) for row in rows[:2]] == [
        (["text 0"], 48, "u0"),
        (["text 1"], 48, "u1"),
    ]
    content = json.loads(samples[0]["json"])
    assert (content["similarity"], content["captions"]) == (0.5, ["text 0"])
    assert content["sha256"] == rows[0]["sha256"] == hashlib.sha256(encode_noise(0)).hexdigest()
    assert list(samples[0]) == ["jpg", "txt", "json", "seg.cls"]
    assert samples[0]["txt"] == b"text 0"
    assert verify_dataset(tmp_path / "out", decode=True, processes=1)
    path = tmp_path / "out" / "00000.tar"  # a flipped bit is told although the json has fields that the sidecar lacks
    data = bytearray(path.read_bytes())
    data[data.index(b"text 1", 5000) + 5] ^= 1
    path.write_bytes(data)
    (problem,) = verify_dataset(tmp_path / "out", processes=1).problems
    assert problem.key == "000000001"


def test_columns_of_other_types_are_brought_together(sources, tmp_path):
    root = shutil.copytree(sources, tmp_path / "sources")
    for folder, columns in (
        ("a", {"score": pyarrow.int32(), "Mixed": pyarrow.int64()}),
        ("b", {"score": pyarrow.float64(), "mixed": pyarrow.string()}),
    ):
        manifest = Manifest.load(root / folder)
        for shard in manifest.shards:
            path = root / folder / shard.name.replace(".tar", ".parquet")
            table = pyarrow.parquet.read_table(path)
            for name, kind in columns.items():
                table = table.append_column(name, pyarrow.array([7] * table.num_rows).cast(kind))
            width = table.column_names.index("width")
            if folder == "b":
                table = table.set_column(width, "width", table.column("width").cast(pyarrow.float64()))
            pyarrow.parquet.write_table(table, path)
    reshard([root / "a", root / "b"], tmp_path / "out", processes=1)
    rows = read_rows(tmp_path / "out")
    assert [row["score"] for row in rows] == [7.0] * 12
    assert [row["Mixed"] for row in rows] == ["7"] * 12
    assert [row["width"] for row in rows] == [
        row["width"] for row in read_rows(sources / "a") + read_rows(sources / "b")
    ]
    schema = pyarrow.parquet.read_schema(tmp_path / "out" / "00000.parquet")
    assert (schema.field("width").type, schema.field("score").type) == (pyarrow.int32(), pyarrow.float64())


def test_a_damaged_sample_is_never_copied(sources, tmp_path):
    root = shutil.copytree(sources, tmp_path / "sources")
    path = root / "a" / "00002.tar"
    whole = path.read_bytes()
    for byte, text in ((100, "the header is damaged"), (700, "its picture is not the one of the sidecar")):
        data = bytearray(whole)
        data[byte] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=rf"00002\.tar: the sample at bytes 0 to \d+: .*{text}.*verify DIR --quarantine"
        ):
            reshard([root / "a"], tmp_path / "out", processes=1)
    verify_dataset(root / "a", quarantine=True, processes=1)
    assert reshard([root / "a"], tmp_path / "out", processes=1, restart=True).samples == 6


def test_a_shard_has_about_so_many_bytes():
    assert cut_shards(np.array([4, 4, 4, 20, 4, 4]), None, 8) == [2, 1, 1, 2]
    assert cut_shards(np.array([9, 9]), None, 1) == [1, 1]
    assert cut_shards(np.array([1] * 7), 3, None) == [3, 3, 1]


def mix_by_hand(seed: int, number: int) -> int:
    start = int.from_bytes(hashlib.sha256(f"{seed}/2".encode()).digest()[:8], "little")
    value = (number * 0x9E3779B97F4A7C15 + start) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_the_order_is_a_pure_function():
    assert list(order_samples(6, 6, False, 0)) == [0, 1, 2, 3, 4, 5]
    hashes = [mix_by_hand(5, number) for number in range(50)]
    by_hand = sorted(range(50), key=hashes.__getitem__)
    assert [int(rank) for rank in order_samples(50, 50, True, 5)] == [by_hand.index(number) for number in range(50)]
    assert list(order_samples(8, 8, True, 5)) == [6, 0, 2, 3, 7, 5, 1, 4]  # the same on any machine, for good
    ranks = order_samples(1000, 100, True, 1)
    assert sorted(ranks[ranks >= 0]) == list(range(100))
    kept = order_samples(1000, 100, False, 1)
    assert list(np.flatnonzero(kept >= 0)) == list(np.flatnonzero(ranks >= 0))
    assert (np.diff(kept[kept >= 0]) == 1).all()
    means = [order_samples(10_000, 10_000, True, seed)[:100].mean() for seed in range(20)]
    assert 4500 < np.mean(means) < 5500


def test_a_number_or_a_share_is_drawn():
    assert [count_drawn(text, 1000) for text in (None, "5", "1000", "0.1", "10%", "1.0", ".25", 3, 0.5)] == [
        1000, 5, 1000, 100, 100, 1000, 250, 3, 500
    ]  # fmt: skip
    for text in ("0", "1001", "-1", "ten", "1.5", "200%", "", "nan"):
        with pytest.raises(UserError, match="--sample"):
            count_drawn(text, 1000)


def test_behind_a_url(sources, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        reshard([sources / "a"], "memory://reshard-out", samples_per_shard=3, processes=1)
        reshard(["memory://reshard-out"], tmp_path / "out", samples_per_shard=2, processes=1)
        assert hash_pictures(tmp_path / "out") == hash_pictures(sources / "a")
        assert verify_dataset("memory://reshard-out", processes=1)
    finally:
        memory.rm("/reshard-out", recursive=True)


def test_the_command(sources, tmp_path, run_data_tools):
    arguments = ["reshard", sources / "a", sources / "b", tmp_path / "out", "--shard-bytes", 20_000, "--sample", "50%"]
    run = run_data_tools(*arguments, "--processes", 1, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["samples"] == 6
    assert "finished already" in run_data_tools(*arguments, "--processes", 1).stdout
    assert run_data_tools("reshard", sources / "a", tmp_path / "x", "--samples-per-shard", 0).stderr.count("\n") == 1
    assert "example:\n  python -m data_tools reshard" in run_data_tools("reshard", "--help").stdout
