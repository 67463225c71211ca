"""The loader against its promises: a pure function of position, whatever the ranks, the threads and the bad samples."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import ConfigError
from pretrain.data.augment import AugmentConfig
from pretrain.data.loader import DataConfig, Loader
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
    shards: Path, tokenizer, world: World | None = None, threads: int = 1, batch: int = 8, seed: int = 0
) -> Loader:
    config = DataConfig(path=str(shards), threads=threads, augment=AugmentConfig(flip=0.5))
    return Loader(config, tokenizer, 32, batch, seed, world or World())


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
    state = first.state()
    assert state["position"] == 32 and all(isinstance(value, int | str) for value in state.values())
    second = make(shards / "train", tokenizer, threads=2)
    second.restore(state)
    for batch, expected in zip(take(second, 5), whole[4:], strict=True):
        assert batch.keys == expected.keys and torch.equal(batch.image, expected.image)


@pytest.mark.parametrize("change", ["seed", "batch", "data"])
def test_a_state_of_another_order_is_refused(change: str, shards: Path, tokenizer) -> None:
    state = make(shards / "train", tokenizer).state()
    other = {
        "seed": lambda: make(shards / "train", tokenizer, seed=1),
        "batch": lambda: make(shards / "train", tokenizer, batch=16),
        "data": lambda: make(shards / "val", tokenizer),
    }[change]()
    with pytest.raises(ConfigError, match="order of samples would change"):
        other.restore(state)


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
    assert loader.skipped >= 1 and "replaced" in caplog.text
    for step, (batch, expected) in enumerate(zip(after, before, strict=True)):
        for row in range(8):
            if expected.keys[row] == victim:
                assert batch.keys[row] != victim
            else:
                assert batch.keys[row] == expected.keys[row], (step, row)
    again = take(make(damaged, tokenizer, threads=3), 6)
    assert [batch.keys for batch in again] == [batch.keys for batch in after]


def test_a_dataset_with_nothing_usable_says_so(shards: Path, tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards / "train", broken)
    for tar in broken.glob("*.tar"):
        data = tar.read_bytes().replace(b"\xff\xd8\xff", b"\0\0\0")
        tar.write_bytes(data)
    with pytest.raises(Exception, match="100 samples in a row could not be read"):
        take(make(broken, tokenizer), 1)


def test_sizes_that_cannot_work_are_refused(shards: Path, tokenizer) -> None:
    with pytest.raises(ConfigError, match="cannot be shared equally by 3 ranks"):
        make(shards / "train", tokenizer, World(0, 3))
    with pytest.raises(ConfigError, match="more than the 48 samples"):
        make(shards / "train", tokenizer, batch=64)


def test_the_mask_covers_the_end_mark_and_no_padding(tokenizer) -> None:
    ids, mask = tokenizer(["a small red circle!", "x " * 100, "!"])
    for row in range(3):
        real = ids[row][mask[row]]
        assert real[0] == 49406 and real[-1] == 49407 and (ids[row][~mask[row]] == 0).all()
    assert mask[1].all()
