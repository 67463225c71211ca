"""The loader against its promises: a pure function of position, whatever the ranks, the threads and the bad samples."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image
from ranks import run_on_ranks
from stores import serve, wait_for, write_shards

from data_tools.errors import UserError
from data_tools.shards import Manifest, ShardError, ShardReader, write_shard
from pretrain.config import ConfigError
from pretrain.data.augment import AugmentConfig
from pretrain.data.cache import CacheConfig
from pretrain.data.loader import DataConfig, Loader, open_loader
from pretrain.data.streaming import StreamReader
from pretrain.data.supply import IndexedSupply, share_open_files
from pretrain.data.text import ClipTokenizerConfig, build_tokenizer
from pretrain.world import World


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ClipTokenizerConfig(), 24)


def take(loader: Loader, count: int) -> list:
    batches = iter(loader)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def make(
    shards: Path, tokenizer, world: World | None = None, threads: int = 1, batch: int = 8, seed: int = 0, **data
) -> Loader:
    config = DataConfig(path=str(shards), threads=threads, augment=AugmentConfig(flip=0.5), **data)
    return Loader(config, tokenizer, 32, batch, seed, world or World())


class NoTokenizer:
    """Ids that nobody looks at."""

    context_length = 2

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(texts), 2, dtype=torch.int64), torch.ones(len(texts), 2, dtype=torch.bool)


def draw_picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, colour // 256, 0)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_dataset(folder: Path, counts: list[int], name: str = "s") -> Path:
    """Shards of so many samples each, of one colour a sample and with three captions."""
    folder.mkdir(parents=True)
    infos = []
    for number, count in enumerate(counts):
        with write_shard(folder, f"{number:05d}.tar") as writer:
            for place in range(count):
                key = f"{name}{number:04d}_{place:04d}"
                texts = [f"{key} {text}" for text in "abc"]
                writer.add(key, {"jpg": draw_picture(place), "json": json.dumps({"captions": texts}).encode()})
        infos.append(writer.info)
    Manifest.of_shards(folder, infos).write()
    return folder


def flip_bytes(folder: Path, share: float, seed: int = 0) -> set[str]:
    """Damage the pictures of a share of the samples; returns their keys."""
    manifest, damaged = Manifest.load(folder), set()
    draw = np.random.default_rng(seed)
    for number, shard in enumerate(manifest.shards):
        data = bytearray((folder / shard.name).read_bytes())
        offsets = manifest.load_index(number)
        for place in np.flatnonzero(draw.random(shard.samples) < share):
            start = int(offsets[place])
            damaged.add(data[start : start + 100].split(b".")[0].decode())
            data[start + 512 : start + 532] = bytes(byte ^ 0xFF for byte in data[start + 512 : start + 532])
        (folder / shard.name).write_bytes(data)
    return damaged


def take_keys(config: DataConfig, batch: int, steps: int, world: World, state: dict | None = None) -> list[list[str]]:
    loader = Loader(config, NoTokenizer(), 8, batch, 3, world)
    if state:
        loader.restore(state)
    return [batch.keys for batch in take(loader, steps)]


def fields(batches: list) -> list[torch.Tensor]:
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("image", "ids", "mask", "image_id")]


def test_ranks_and_threads_do_not_change_the_global_batches(shards: Path, tokenizer) -> None:
    alone = take(make(shards / "train", tokenizer), 9)
    parts = [take(make(shards / "train", tokenizer, World(rank, 4, rank), threads=3), 9) for rank in range(4)]
    for step, batch in enumerate(alone):
        joined = [part[step] for part in parts]
        assert [key for part in joined for key in part.keys] == batch.keys
        for together, expected in zip(fields(joined), fields([batch]), strict=True):
            assert torch.equal(together, expected)


def test_an_epoch_is_every_sample_once_though_batches_straddle_it(shards: Path, tokenizer) -> None:
    batches = take(make(shards / "train", tokenizer, batch=10), 24)  # 240 samples = 5 epochs of 48
    keys = [key for batch in batches for key in batch.keys]
    for epoch in range(5):
        assert len(set(keys[48 * epoch : 48 * (epoch + 1)])) == 48
    assert keys[:48] != keys[48:96]


def test_captions_and_crops_change_between_epochs(shards: Path, tokenizer) -> None:
    by_key: dict[str, list] = {}
    for batch in take(make(shards / "train", tokenizer), 24):
        for row, key in enumerate(batch.keys):
            by_key.setdefault(key, []).append((batch.text_id[row].item(), batch.image[row]))
    assert np.mean([len({text for text, _ in seen}) > 1 for seen in by_key.values()]) > 0.8
    assert all(not torch.equal(seen[0][1], seen[1][1]) for seen in by_key.values())


def test_state_resumes_in_mid_epoch(shards: Path, tokenizer) -> None:
    whole = take(make(shards / "train", tokenizer), 9)
    first = make(shards / "train", tokenizer)
    take(first, 4)
    state = json.loads(json.dumps(first.state()))
    assert state["position"] == 32 and len(json.dumps(state)) < 1000
    second = make(shards / "train", tokenizer, threads=2)
    second.restore(state)
    for batch, expected in zip(take(second, 5), whole[4:], strict=True):
        assert batch.keys == expected.keys and torch.equal(batch.image, expected.image)


@pytest.mark.parametrize("change", ["seed", "batch", "data", "window"])
def test_a_state_of_another_order_is_refused(change: str, shards: Path, tokenizer) -> None:
    state = make(shards / "train", tokenizer).state()
    other = {
        "seed": lambda: make(shards / "train", tokenizer, seed=1),
        "batch": lambda: make(shards / "train", tokenizer, batch=16),
        "data": lambda: make(shards / "val", tokenizer),
        "window": lambda: make(shards / "train", tokenizer, window_samples=10),
    }[change]()
    with pytest.raises(ConfigError, match="order of samples would change"):
        other.restore(state)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_topology_gives_the_same_batches_and_each_epoch_each_sample_once(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("property")
    draw = data.draw
    datasets = []
    for number in range(draw(st.integers(1, 3), "datasets")):
        counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=40).filter(lambda c: sum(c) >= 24), "counts")
        path = write_dataset(folder / str(number), counts, name=f"d{number}s")
        datasets.append(
            {"path": str(path), "weight": draw(st.sampled_from([1, 1, 2, 0.5]), "weight"), "keys": sum(counts)}
        )
    ranks = draw(st.integers(1, 8), "ranks")
    batch = ranks * draw(st.integers(1, 24 // ranks), "rows")
    entries = [{"path": entry["path"], "weight": entry["weight"]} for entry in datasets]
    window = draw(st.sampled_from([1, 7, 100]), "window")

    def config(threads: int) -> DataConfig:
        return DataConfig(datasets=entries, threads=threads, window_samples=window)

    total, weights = sum(entry["keys"] for entry in datasets), sum(entry["weight"] for entry in datasets)
    rarest = max(entry["keys"] * weights / entry["weight"] for entry in datasets)
    steps = int(min(2 * rarest, 4 * total) // batch) + 2
    alone = take_keys(config(0), batch, steps, World())
    cut = draw(st.integers(0, steps - 1), "cut")
    threads = draw(st.integers(0, 4), "threads")
    first = Loader(config(1), NoTokenizer(), 8, batch, 3, World())
    take(first, cut)
    state = first.state()
    parts = [take_keys(config(threads), batch, steps - cut, World(rank, ranks, rank), state) for rank in range(ranks)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == alone[cut:]
    flat = sum(alone, [])
    for number, entry in enumerate(datasets):
        own = [key for key in flat if key.startswith(f"d{number}s")]
        for epoch in range(len(own) // entry["keys"]):
            assert max(Counter(own[epoch * entry["keys"] : (epoch + 1) * entry["keys"]]).values()) == 1


def test_a_blend_keeps_its_shares_and_counts_them(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name, counts, name=name) for name, counts in (("a", [30, 9]), ("b", [50]))]
    config = DataConfig(datasets=[{"path": str(paths[0]), "weight": 3}, {"path": str(paths[1]), "weight": 1}])
    loader = Loader(config, NoTokenizer(), 8, 16, 0, World())
    keys = [key for batch in take(loader, 20) for key in batch.keys]
    assert abs(sum(key.startswith("a") for key in keys) - 240) <= 1
    measured = loader.measure()
    assert {measured[f"data/samples/{path}"] for path in paths} <= {240, 80, 239, 241, 79, 81}
    by_epochs = DataConfig(datasets=[{"path": str(paths[0]), "epochs": 2}, {"path": str(paths[1]), "epochs": 0.5}])
    loader = Loader(by_epochs, NoTokenizer(), 8, 1, 0, World())
    assert loader.supply.epoch_samples == 2 * 39 + 25
    keys = [batch.keys[0] for batch in take(loader, 2 * 39 + 25)]
    assert sum(key.startswith("a") for key in keys) == 78


def test_equal_keys_of_two_datasets_are_two_pictures(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name, [20]) for name in "ab"]  # with the same keys
    config = DataConfig(datasets=[{"path": str(path), "weight": 1} for path in paths])
    (batch,) = take(Loader(config, NoTokenizer(), 8, 40, 0, World()), 1)
    assert len(set(batch.keys)) == 20 and len(set(batch.image_id.tolist())) == 40


def test_captions_come_in_turn(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [12])
    seen: dict[str, list[str]] = {}

    class Listening(NoTokenizer):
        def __call__(self, texts: list[str]):
            for text in texts:
                seen.setdefault(text[:-2], []).append(text)
            return super().__call__(texts)

    take(Loader(DataConfig(path=str(path), captions="turn", threads=0), Listening(), 8, 12, 0, World()), 6)
    for texts in seen.values():  # what was decoded ahead included
        whole = texts[: len(texts) // 3 * 3]
        assert all(len(set(whole[first : first + 3])) == 3 for first in range(0, len(whole), 3)) and len(whole) >= 6
    assert len({texts[0][-1] for texts in seen.values()}) > 1  # they do not all begin with the first


def test_a_damaged_sample_is_replaced_without_shifting_the_rest(
    shards: Path, tokenizer, tmp_path: Path, caplog
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards / "train", damaged)
    before = take(make(damaged, tokenizer), 6)
    victim = before[2].keys[3]
    tar = damaged / f"{victim[:5]}.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(f"{victim}.jpg".encode()) + 512
    data[start : start + 400] = bytes(400)  # the picture's first bytes; its header stays
    tar.write_bytes(data)
    loader = make(damaged, tokenizer)
    after = take(loader, 6)
    assert loader.tally.skipped[0] >= 1 and "replaced" in caplog.text
    for step, (batch, expected) in enumerate(zip(after, before, strict=True)):
        for row in range(8):
            if expected.keys[row] == victim:
                assert batch.keys[row] != victim
            else:
                assert batch.keys[row] == expected.keys[row], (step, row)


def test_bad_samples_are_the_same_everywhere(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [37, 11, 52, 100], name="a")
    config = DataConfig(path=str(path), max_bad_share=1, window_samples=20)
    whole = take_keys(config, 8, 75, World())
    damaged = flip_bytes(path, 0.01, seed=2)
    assert 1 <= len(damaged) <= 6
    alone = take_keys(config, 8, 75, World())
    for batch, expected in zip(alone, whole, strict=True):
        for key, good in zip(batch, expected, strict=True):
            assert key == good or good in damaged
            assert key not in damaged
    first = Loader(config, NoTokenizer(), 8, 8, 3, World())
    take(first, 31)
    parts = [
        take_keys(config.model_copy(update={"threads": rank}), 8, 44, World(rank, 4, rank), first.state())
        for rank in range(4)
    ]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == alone[31:]


def test_too_many_bad_samples_end_the_run_also_over_resumes(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [200, 300])
    flip_bytes(path, 0.2)
    strict, lenient = DataConfig(path=str(path)), DataConfig(path=str(path), max_bad_share=0.5)
    loader = Loader(strict, NoTokenizer(), 8, 25, 3, World())
    take(loader, 30)
    assert loader.measure()["data/skipped"] > 100  # fewer than a thousand samples: too early to judge
    state = json.loads(json.dumps(loader.state()))
    for config in (strict, lenient):
        loader = Loader(config, NoTokenizer(), 8, 25, 3, World())
        loader.restore(state)
        if config is lenient:
            take(loader, 10)
            assert 150 < loader.measure()["data/skipped"] < 250
            continue
        take(loader, 9)
        message = r"of 1000 samples could not be used, more than data.max_bad_share = 0.05; one of them"
        with pytest.raises(UserError, match=message):
            take(loader, 1)


def test_bad_samples_are_listed_where_they_lie(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [20, 30])
    (path / "quarantine.json").write_text('{"00001.tar": {"0": "dark"}}')
    damaged = flip_bytes(path, 0.1)
    config, record = DataConfig(path=str(path), max_bad_share=1), tmp_path / "run" / "data"
    loader = Loader(config, NoTokenizer(), 8, 7, 0, World(), record)
    take(loader, 7)
    lines = [json.loads(line) for line in (record / "bad-rank-00000.jsonl").read_text().splitlines()]
    assert {f"s{int(line['shard'][:5]):04d}_{line['place']:04d}" for line in lines} == damaged - {"s0001_0000"}
    assert len(lines) == sum(loader.tally.skipped) and lines == sorted(lines, key=lambda line: line["position"])
    assert all(line["dataset"] == str(path) and "picture" in line["reason"] for line in lines)


def add_shard(path: Path) -> None:
    write_dataset(path.parent / "more", [20, 30, 10], name="b")
    for file in (path.parent / "more").iterdir():
        shutil.copy(file, path / file.name)


def grow_shard(path: Path) -> None:
    shutil.rmtree(path)
    write_dataset(path, [20, 31], name="b")


def remove_shard(path: Path) -> None:
    shutil.rmtree(path)
    write_dataset(path, [20], name="b")


def quarantine(path: Path) -> None:
    (path / "quarantine.json").write_text('{"00001.tar": {"3": "dark"}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_shard, "1 shard added (00002.tar); 50 samples then, 60 now"),
        (remove_shard, "1 shard removed (00001.tar); 50 samples then, 20 now"),
        (grow_shard, "1 shard of another size (00001.tar); 50 samples then, 51 now"),
        (quarantine, "1 shard of which other samples count (view or quarantine) (00001.tar); 50 samples then, 49 now"),
    ],
)
def test_a_dataset_that_has_changed_is_named_with_what_has(change, message: str, tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name / "data", [20, 30], name=name) for name in "ab"]
    config, record = DataConfig(datasets=[{"path": str(path), "weight": 1} for path in paths]), tmp_path / "record"
    loader = Loader(config, NoTokenizer(), 8, 4, 0, World(), record)
    loader.supply.put_on_record(record)
    state = json.loads(json.dumps(loader.state()))
    change(paths[1])
    now = Loader(config, NoTokenizer(), 8, 4, 0, World(), record)
    with pytest.raises(ConfigError, match="the data have changed since the run was started") as caught:
        now.restore(state)
    assert f"{paths[1]}: {message}" in str(caught.value) and str(paths[0]) not in str(caught.value)
    now.record = None  # of a run whose record is gone
    with pytest.raises(ConfigError, match=f"{paths[1]}: it is another dataset than before"):
        now.restore(state)
    alone = Loader(DataConfig(path=str(paths[0])), NoTokenizer(), 8, 4, 0, World(), record)
    with pytest.raises(ConfigError, match=f"{paths[1]} is gone"):
        alone.restore(state)


def read_badly(world: World, path: str, bad: range, state: dict | None, share: float) -> tuple[int, dict, str]:
    """Steps done, the state then and how it ended, where the samples of some positions are bad."""
    read = IndexedSupply.read

    def read_or_fail(supply, draw, row: int, attempt: int):
        if draw.positions[row] in bad and not attempt:
            raise ShardError("injected")
        return read(supply, draw, row, attempt)

    IndexedSupply.read = read_or_fail
    loader = Loader(DataConfig(path=path, max_bad_share=share), NoTokenizer(), 8, 20, 0, world)
    if state:
        loader.restore(state)
    batches, end = iter(loader), ""
    try:
        for _ in range(60):
            batches.agree()
            next(batches)
    except UserError as error:
        end = str(error)
    finally:
        batches.close()
        IndexedSupply.read = read
    return loader.position // 20, loader.state(), end


@pytest.mark.parametrize(
    ("bad", "share", "steps", "message"),
    [
        (range(313, 413), 1.0, 20, "100 samples in a row could not be used; one of them: .*injected"),
        (range(313, 412), 1.0, 60, ""),
        (range(0, 1200, 10), 0.09, 49, "100 of 1000 samples could not be used, more than data.max_bad_share = 0.09"),
    ],
)
def test_bad_samples_are_judged_alike_on_any_number_of_ranks(bad, share, steps, message, tmp_path: Path) -> None:
    path = str(write_dataset(tmp_path / "a", [200, 100]))
    first = read_badly(World(), path, bad, None, share)
    assert first[0] == steps and re.search(message, first[2])
    for ranks in (2, 4):
        told = run_on_ranks(read_badly, ranks, path, bad, None, share)
        assert {(done, end) for done, _, end in told} == {(steps, first[2])}
        assert told[0][1] == first[1]


def test_bad_samples_in_a_row_are_counted_over_a_resume(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [200, 100])
    bad = range(313, 413)
    loader = Loader(DataConfig(path=str(path), max_bad_share=1), NoTokenizer(), 8, 20, 0, World())
    read = loader.supply.read

    def read_or_fail(draw, row: int, attempt: int):
        if draw.positions[row] in bad and not attempt:
            raise ShardError("injected")
        return read(draw, row, attempt)

    loader.supply.read = read_or_fail
    take(loader, 18)
    state = json.loads(json.dumps(loader.state()))
    assert state["tally"]["in_a_row"] == 47
    for ranks in (1, 2):
        told = run_on_ranks(read_badly, ranks, str(path), bad, state, 1.0)
        assert all(done == 20 and "100 samples in a row" in end for done, _, end in told)


def test_a_dataset_with_nothing_usable_says_so(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [30, 70])
    flip_bytes(path, 1.0)
    with pytest.raises(UserError, match="100 samples in a row could not be used at position 0, 100 of them because"):
        take_keys(DataConfig(path=str(path)), 10, 1, World())


def test_a_vanished_shard_is_so_many_bad_samples(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [10] * 20)
    loader = Loader(DataConfig(path=str(path), max_bad_share=1), NoTokenizer(), 8, 10, 0, World())
    (path / "00007.tar").unlink()
    keys = [key for batch in take(loader, 20) for key in batch.keys]
    assert len(keys) == 200 and not any(key.startswith("s0007") for key in keys) and loader.tally.skipped == (10,)


def test_a_mistake_in_the_program_is_not_a_bad_sample(tmp_path: Path) -> None:
    class Broken(NoTokenizer):
        def __call__(self, texts: list[str]):
            raise TypeError("a mistake")

    path = write_dataset(tmp_path / "a", [50])
    loader = Loader(DataConfig(path=str(path), threads=3), Broken(), 8, 10, 0, World())
    with pytest.raises(TypeError, match="a mistake"):
        take(loader, 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_no_thread_outlives_the_iterator(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [50])
    loader = Loader(DataConfig(path=str(path), threads=3), NoTokenizer(), 8, 10, 0, World())
    before = set(threading.enumerate())
    take(loader, 3)
    assert set(threading.enumerate()) == before
    assert [batch.keys for batch in take(loader, 2)]  # and it can begin again


def test_without_threads_nothing_is_read_ahead(tmp_path: Path, monkeypatch) -> None:
    read, rows = IndexedSupply.read, []
    monkeypatch.setattr(IndexedSupply, "read", lambda self, *row: rows.append(row) or read(self, *row))
    path = write_dataset(tmp_path / "a", [50])
    take(Loader(DataConfig(path=str(path), threads=0), NoTokenizer(), 8, 10, 0, World()), 2)
    assert len(rows) == 20


def test_each_epoch_ends_with_a_proof(tmp_path: Path, caplog, monkeypatch) -> None:
    path = write_dataset(tmp_path / "a", [10, 15])
    caplog.set_level("INFO")

    def run(lose: int | None) -> str:
        caplog.clear()
        loader = Loader(DataConfig(path=str(path)), NoTokenizer(), 8, 10, 0, World())
        at = loader.supply.order.at

        def at_with_a_double(positions):
            places = at(positions)
            if lose is not None and lose in positions:
                row = int(np.flatnonzero(positions == lose)[0])
                for part in (places.shard, places.place):
                    part[row] = part[row - 1]
            return places

        monkeypatch.setattr(loader.supply.order, "at", at_with_a_double)
        batches = iter(loader)
        for _ in range(6):
            next(batches)
            loader.close_epochs()
        batches.close()
        return caplog.text

    assert run(None).count("25 samples, each once") == 2 and "ERROR" not in run(None)
    text = run(33)
    assert text.count("25 samples, each once") == 1 and text.count("ERROR") == 1 and "not each once" in text


@pytest.mark.parametrize("how", ["another place", "another shard", "bytes of another", None])
@pytest.mark.parametrize("view", [False, True])
def test_a_reader_that_gives_the_wrong_sample_raises_the_alarm(
    how, view: bool, tmp_path: Path, caplog, monkeypatch
) -> None:
    path = write_dataset(tmp_path / "a", [10, 17])
    if view:  # of 25 of them
        (path / "quarantine.json").write_text('{"00001.tar": {"0": "dark", "5": "dark"}}')
    read_selected, reads = ShardReader.read_selected, Counter()

    def read_wrongly(reader, shard: int, place: int):
        raw = read_selected(reader, shard, place)
        reads[shard, place] += 1
        if how and (shard, place) == (1, 3) and reads[shard, place] == 2:
            other = read_selected(reader, *((0, 3) if how == "another shard" else (1, 4)))
            return replace(other, origin=raw.origin) if how == "bytes of another" else other
        return raw

    monkeypatch.setattr(ShardReader, "read_selected", read_wrongly)
    caplog.set_level("INFO")
    loader = Loader(DataConfig(path=str(path), threads=0), NoTokenizer(), 8, 9, 0, World())
    batches = iter(loader)
    while loader.position < 3 * (25 if view else 27) + 9:
        next(batches)
        loader.close_epochs()
    batches.close()
    alarms = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    proofs = [text for text in caplog.messages if ", each once (fingerprint" in text]
    assert (len(proofs), len(alarms)) == ((2, 1) if how else (3, 0))
    if how:
        expected = "keys are not those of an epoch before" if how == "bytes of another" else "not each once"
        assert "epoch 1 of" in alarms[0] and expected in alarms[0]


def count_epochs(world: World, path: str) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("pretrain.data.loader").addHandler(handler)
    logging.getLogger("pretrain.data.loader").setLevel("INFO")
    loader = Loader(DataConfig(path=path), NoTokenizer(), 8, 10, 0, world)
    state = None
    for _ in range(2):  # in two runs
        loader = Loader(DataConfig(path=path), NoTokenizer(), 8, 10, 0, world)
        if state:
            loader.restore(state)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
            loader.close_epochs()
        batches.close()
        state = loader.state()
    return lines


def test_the_proof_covers_all_ranks_and_a_resume(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [10, 15, 20])
    lines, others = run_on_ranks(count_epochs, 2, str(path))
    assert len(lines) == 1 and "45 samples, each once" in lines[0] and others == []


KILLED = """
import json, sys
from test_loader import NoTokenizer
from pretrain.data.loader import DataConfig, Loader, open_loader
from pretrain.world import World

path, state_path, rank, size, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
loader = Loader(DataConfig(path=path, threads=2, window_samples=30), NoTokenizer(), 8, 24, 3, World(rank, size, rank))
try:
    loader.restore(json.load(open(state_path)))
except FileNotFoundError:
    pass
for batch in loader:
    print(json.dumps([loader.position, batch.keys]), flush=True)
    if loader.position == 24 * steps:
        break
"""


def test_sigkill_at_random_steps_and_another_number_of_ranks(tmp_path: Path) -> None:
    """Real processes, killed; what was done is known from the batches that came out."""
    path = write_dataset(tmp_path / "a", [13, 40, 7, 61, 29])
    config = DataConfig(path=str(path), window_samples=30)
    expected = take_keys(config, 24, 40, World())
    state_path = tmp_path / "state.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'pretrain'}"}
    done, draw = 0, np.random.default_rng(5)
    for size in (2, 1):
        command = [sys.executable, "-c", KILLED, str(path), str(state_path)]
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), "40"], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        until = 40 if size == 1 else done + int(draw.integers(3, 12))
        parts = [[json.loads(process.stdout.readline()) for _ in range(until - done)] for process in ranks]
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            process.stdout.close()
        for step in range(until - done):
            assert {part[step][0] for part in parts} == {24 * (done + step + 1)}
            assert sum((part[step][1] for part in parts), []) == expected[done + step]
        done = until
        loader = Loader(config, NoTokenizer(), 8, 24, 3, World())
        state_path.write_text(json.dumps(loader.state() | {"position": 24 * done}))
    assert done == 40


def test_a_store_that_goes_away_for_a_while(tmp_path: Path) -> None:
    """The same batches as from the disk, though the store is gone for a second; and nothing is left behind."""
    path = write_dataset(tmp_path / "a", [40, 25, 60], name="a")
    local = take_keys(DataConfig(path=str(path)), 5, 25, World())
    cache = CacheConfig(folder=str(tmp_path / "cache"), timeout_s=1, retry_for_s=30, download_threads=1)
    before = set(threading.enumerate())
    with serve(path) as store:
        config = DataConfig(path=store.url, cache=cache, prefetch_mib=1, window_samples=10)
        expected = take_keys(config.model_copy(update={"path": str(path)}), 5, 25, World())
        loader = Loader(config, NoTokenizer(), 8, 5, 3, World())
        store.stop()
        threading.Timer(1.0, store.start).start()
        batches = iter(loader)
        assert [next(batches).keys for _ in range(25)] == expected != local
        batches.close()
        assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".part")]
    wait_for(lambda: not {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fetch")})


def test_each_of_many_shards_is_opened_once(tmp_path: Path, monkeypatch) -> None:
    path, opened = write_shards(tmp_path / "a", shards=600, samples=2, size=10).directory.path, Counter()
    open_shard = ShardReader._open_shard

    def open_and_count(reader, number: int, *others):
        opened[number] += 1
        return open_shard(reader, number, *others)

    monkeypatch.setattr(ShardReader, "_open_shard", open_and_count)
    supply = IndexedSupply(config := DataConfig(path=str(path)), config.entries(), 0, 100)
    supply.open(0, 0)
    for first in range(0, 3600, 100):
        draw = supply.draw(np.arange(first, first + 100))
        assert all(supply.read(draw, row, 0) for row in range(100))
    supply.close()
    assert len(opened) == 600 == opened.total()


def test_open_files_are_shared_within_the_limit(monkeypatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert share_open_files([np.full(100, 10)]) == [512]  # as ever
    assert share_open_files([np.full(600, 10), np.full(1200, 10)]) == [600, 1200] and limits[-1] == (2824, 4096)
    assert share_open_files([np.full(100_000, 10)]) == [3072] and limits[-1] == (4096, 4096)
    assert share_open_files([np.full(1000, 100_000)]) == [512]  # whose indexes are large


def test_a_stream(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [20, 30, 10], name="a")
    config = DataConfig(path=f"pipe:cat {path}/{{00000..00002}}.tar", captions="turn", threads=3)
    loader = Loader(config, NoTokenizer(), 8, 10, 0, World())
    keys = {key for batch in take(loader, 30) for key in batch.keys}
    assert len(keys) > 50 and loader.supply.epoch_samples is None
    state = loader.state()
    assert state["position"] == 300
    loader.restore(state)
    assert len(take(loader, 1)[0].keys) == 10
    with pytest.raises(ConfigError, match="cannot be blended"):
        Loader(
            DataConfig(datasets=[{"path": config.path, "weight": 1}, {"path": str(path), "weight": 1}]),
            *(NoTokenizer(), 8, 10, 0, World()),
        )


@pytest.mark.parametrize("captions", ["random", "turn"])
def test_a_stream_draws_captions_anew(captions: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", [10])
    loader = Loader(DataConfig(path=f"pipe:cat {path}/00000.tar", captions=captions), NoTokenizer(), 8, 10, 0, World())
    seen: dict[str, set[int]] = {}
    for batch in take(loader, 60):  # a sample comes 48 times: that one caption never does has a chance of 1e-7
        for key, text in zip(batch.keys, batch.text_id.tolist(), strict=True):
            seen.setdefault(key, set()).add(text)
    assert {len(texts) for texts in seen.values()} == {3}


def test_the_end_of_a_stream_is_told_to_every_thread(monkeypatch) -> None:
    def end_at_once(self):
        raise UserError("nothing more comes")
        yield

    monkeypatch.setattr(StreamReader, "__iter__", end_at_once)
    supply = Loader(DataConfig(path="pipe:true"), NoTokenizer(), 8, 10, 0, World()).supply
    supply.open(0, 1)
    for row in range(2):
        with pytest.raises(UserError, match="nothing more comes"):
            supply.read(supply.draw(np.arange(2)), row, 0)
    supply.close()


def is_even(sample: dict) -> bool:
    return int(sample["__key__"][-1]) % 2 == 0


def shout(sample: dict) -> dict:
    return sample | {"json": {"captions": [text.upper() for text in sample["json"]["captions"]]}}


def test_stages_and_other_fields(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = write_dataset(tmp_path / "a", [20, 30])
    stages = [{"select": "test_loader.is_even"}, {"map": "test_loader.shout", "decoded": True}]
    config = DataConfig(path=str(path), stages=stages, fields=["json", "cls"])
    loader = Loader(config, NoTokenizer(), 8, 10, 0, World())
    for batch in take(loader, 5):
        assert all(int(key[-1]) % 2 == 0 for key in batch.keys)
        assert all(
            extra["captions"][0] == f"{key} a".upper()
            for key, extra in zip(batch.keys, batch.extra["json"], strict=True)
        )
        assert batch.extra["cls"] == [None] * 10
    assert loader.tally.skipped == (0,)  # what a stage rejects is not bad


def test_large_fields_count_as_read_ahead(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").mkdir()
    with write_shard(tmp_path / "a", "00000.tar") as writer:
        for place in range(64):
            fields = {"jpg": draw_picture(place), "txt": b"a", "json": json.dumps(["x" * 1000] * 150).encode()}
            writer.add(f"{place}", fields)
    Manifest.of_shards(tmp_path / "a", [writer.info]).write()
    read, rows = IndexedSupply.read, []
    monkeypatch.setattr(IndexedSupply, "read", lambda self, *row: rows.append(row) or read(self, *row))
    read_ahead = {}
    for fields in ([], ["json"]):
        rows.clear()
        config = DataConfig(path=str(tmp_path / "a"), fields=fields, prefetch_mib=8)
        loader = Loader(config, NoTokenizer(), 8, 8, 0, World())
        with closing(iter(loader)) as batches:
            for _ in range(4):
                next(batches)
            if not fields:
                wait_for(lambda: len(rows) == 8 * (4 + 32))
            else:
                time.sleep(0.5)
        read_ahead[bool(fields)] = len(rows) // 8 - 4
    # A batch of these fields has 1.2 MiB: six of them.
    assert read_ahead == {False: 32, True: 6}


def is_the_first(sample: dict) -> bool:
    return sample["__key__"] == "s0000_0000"


def is_none(sample: dict) -> bool:
    return False


def test_a_stage_may_reject_most_samples_but_not_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = str(write_dataset(tmp_path / "a", [200]))
    one = DataConfig(path=path, stages=[{"select": "test_loader.is_the_first"}])
    assert take_keys(one, 10, 1, World()) == [["s0000_0000"] * 10]
    none = DataConfig(path=path, threads=0, stages=[{"select": "test_loader.is_none"}])
    with pytest.raises(
        UserError, match="data.stages kept none of 10,000 samples; of the last one: test_loader.is_none"
    ):
        take_keys(none, 10, 1, World())


def test_sizes_that_cannot_work_are_refused(shards: Path, tokenizer) -> None:
    with pytest.raises(ConfigError, match="cannot be shared equally by 3 ranks"):
        make(shards / "train", tokenizer, World(0, 3))
    with pytest.raises(ConfigError, match="64 is more than the 48 samples"):
        make(shards / "train", tokenizer, batch=64)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "give either data.path, or several"),
        ({"path": "a", "datasets": [{"path": "b"}]}, "give either data.path, or several"),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}]},
            "give each a weight, or each its epochs",
        ),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, "give each a weight, or each its epochs"),
        ({"datasets": [{"path": "a", "weight": 1}, {"path": "a", "weight": 2}]}, "stands there twice"),
    ],
)
def test_blends_that_cannot_be_meant(values: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DataConfig(**values)


def test_a_list_is_short_for_a_blend() -> None:
    entries = [{"path": "a", "weight": 1.5}, {"path": "b", "weight": 1}]
    assert DataConfig.model_validate(entries) == DataConfig(datasets=entries)


def open_own(world: World, paths: list[Path]) -> str:
    """What is said when each rank opens the data of its own path."""
    config = DataConfig(path=str(paths[world.rank]))
    try:
        open_loader(config, NoTokenizer(), 8, 4, 0, world)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_with_other_data_or_none_are_told_on_every_rank(shards: Path, tmp_path: Path) -> None:
    copy, other, nothing = tmp_path / "copy", tmp_path / "other", tmp_path / "nothing"
    shutil.copytree(shards / "train", copy)
    shutil.copytree(shards / "val", other)
    assert run_on_ranks(open_own, 2, [shards / "train", copy]) == ["", ""]
    for path, message in ((other, "rank 1 on .* sees other data than rank 0"), (nothing, "nothing")):
        said = run_on_ranks(open_own, 2, [shards / "train", path])
        assert all(re.search(message, text) for text in said), said
    assert "rank 1" in said[0]


def test_a_row_that_was_not_filled_raises_the_alarm(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader(DataConfig(path=str(shards / "train"), threads=0), NoTokenizer(), 8, 12, 0, World())
    fill, lost = loader.fill, []

    def fill_and_lose(filling: Any, first: int, last: int) -> None:
        fill(filling, first, last)
        if not lost:
            lost.append(filling.batch.keys[0])
            filling.batch.keys[0] = ""

    loader.fill = fill_and_lose
    batches = iter(loader)
    for _ in range(5):
        next(batches)
        loader.close_epochs()
    batches.close()
    assert lost and "1 too few" in caplog.text
