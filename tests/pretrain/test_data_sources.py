"""Whatever `data.path` may name is opened: folders, views, URLs, patterns of tars; foreign tars are indexed once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from stores import serve, write_shards

from data_tools.errors import UserError
from data_tools.files import open_folder
from data_tools.shards import Manifest, Selection
from pretrain.data.cache import CacheConfig, CachedReader
from pretrain.data.sources import is_stream, load_dataset, open_reader, remove_old_indexes


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), timeout_s=2.0, retry_for_s=2.0, download_threads=1)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of tars and nothing else."""
    folder = tmp_path / "tars"
    write_shards(folder)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return folder


KEYS = [f"{number}_{place}" for number in range(3) for place in range(4)]


def read_keys(path: object, cache: CacheConfig) -> list[str]:
    reader = open_reader(load_dataset(str(path), cache), cache)
    keys = [reader.read(index).key for index in range(len(reader))]
    reader.close()
    return keys


def test_a_local_dataset_is_read_in_place(tmp_path, cache):
    write_shards(tmp_path / "data")
    assert read_keys(tmp_path / "data", cache) == KEYS
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pattern", ["", "/{00000..00002}.tar", "/*.tar"])
def test_tars_of_others_are_indexed_once(tars, cache, caplog, pattern):
    for _ in range(2):
        assert read_keys(f"{tars}{pattern}", cache) == KEYS
    assert caplog.text.count("reading the headers of 3 tars, once") == 1
    assert sorted(os.listdir(tars)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_subset_and_one_tar(tars, cache):
    assert read_keys(tars / "{00002..00001}.tar", cache) == KEYS[8:] + KEYS[4:8]
    assert read_keys(tars / "00001.tar", cache) == KEYS[4:8]


def test_a_tar_that_has_changed_is_indexed_again(tmp_path, tars, cache):
    assert read_keys(tars, cache) == KEYS
    write_shards(tmp_path / "other", shards=3, samples=5)
    os.replace(tmp_path / "other" / "00002.tar", tars / "00002.tar")
    assert read_keys(tars, cache) == [*KEYS, "2_4"]


def test_old_indexes_are_removed_when_nobody_uses_them(tmp_path, tars, cache):
    made = []
    for samples in (5, 6, 7, 8):
        write_shards(tmp_path / "next", shards=3, samples=samples)
        os.replace(tmp_path / "next" / "00002.tar", tars / "00002.tar")
        code = f"from pretrain.data import sources, cache; sources.load_dataset({str(tars)!r}, cache.CacheConfig("
        code += f"folder={str(tmp_path / 'cache')!r}))"
        if samples == 5:
            assert "2_4" in read_keys(tars, cache)  # in this process, which goes on to use it
        else:
            subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        (of_path,) = (tmp_path / "cache" / "indexes").iterdir()
        (new,) = set(of_path.iterdir()) - set(made)
        made.append(new)
        os.utime(new, (time.time() - 100 + samples,) * 2)
    assert [folder.exists() for folder in made] == [True, False, True, True]  # that of here, and the last two
    os.utime(made[2], (time.time() - 100 * 86_400,) * 2)
    remove_old_indexes(tmp_path / "cache" / "indexes")
    assert [folder.exists() for folder in made] == [True, False, False, True]


def test_keys_that_repeat_get_the_name_of_their_tar(tars, cache, caplog):
    (tars / "00001.tar").write_bytes((tars / "00000.tar").read_bytes())
    assert read_keys(tars, cache)[2:6] == ["00000_0_2", "00000_0_3", "00001_0_0", "00001_0_1"]
    assert "4 samples have the key of another (such as 0_0)" in caplog.text


@pytest.mark.parametrize("listing", [True, False])
def test_remote_tars_are_read_through_the_cache(tars, cache, listing):
    with serve(tars, listing=listing) as store:
        for _ in range(2):
            reader = open_reader(load_dataset(f"{store.url}/{{00000..00002}}.tar", cache), cache)
            assert isinstance(reader, CachedReader)
            assert [reader.read(index).key for index in range(12)] == KEYS
            reader.close()
        # Once by the one who reads headers, once into the cache; its sizes are asked for with HEAD.
        assert store.fetched().count("00001.tar") == 2


def test_a_glob_and_a_folder_of_a_store(tmp_path, tars, cache):
    folder = open_folder(f"memory://{tmp_path.name}")
    for path in tars.iterdir():
        folder._fs.pipe_file(f"{folder._root}/{path.name}", path.read_bytes())
    assert read_keys(f"{folder}/0000[12].tar", cache) == KEYS[4:]
    assert read_keys(folder, cache) == KEYS
    folder._fs.pipe_file(f"{folder._root}/00002.tar", (tars / "00001.tar").read_bytes())  # of the same size, but later
    assert read_keys(folder, cache)[8:] == [f"00002_{key}" for key in KEYS[4:8]]
    folder._fs.rm(folder._root, recursive=True)


@pytest.mark.parametrize("listing", [True, False])
def test_a_local_view_of_a_remote_dataset(tmp_path, cache, listing):
    write_shards(tmp_path / "data")
    with serve(tmp_path / "data", listing=listing) as store:
        manifest = load_dataset(store.url, cache)
        masks = [[True, False, True, False], [False] * 4, [True] * 4]
        manifest.write_view(tmp_path / "view", Selection.of_masks(masks), captions=6, options={})
        assert read_keys(tmp_path / "view", cache) == ["0_0", "0_2", *KEYS[8:]]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("none", "no such folder"),
        ("none/{0..2}.tar", "no such tar"),
        ("none/*.tar", "no tar of such a name"),
        ("empty", "no manifest.json"),
        ("unfinished", "is it a finished build"),
        ("pipe:cat x.tar", "a pipe"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path, cache, place, text):
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "build.json").write_text("{}")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    with pytest.raises(UserError, match=text) as caught:
        load_dataset(place if is_stream(place) else str(tmp_path / place), cache)
    assert "\n" not in str(caught.value)


OPEN = """
import sys
from pretrain.data.cache import CacheConfig
from pretrain.data.sources import load_dataset
print(load_dataset(sys.argv[1], CacheConfig(folder=sys.argv[2])).samples)
"""


def test_one_process_of_a_machine_indexes(tars, cache):
    command = [sys.executable, "-c", OPEN, str(tars / "{00000..00002}.tar"), cache.folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [output for output, _ in outputs] == ["12\n", "12\n"], outputs
    assert sum("reading the headers of 3 tars" in errors for _, errors in outputs) == 1


def test_a_manifest_of_the_same_tars_is_the_same_everywhere(tmp_path, tars, cache):
    elsewhere = cache.model_copy(update={"folder": str(tmp_path / "elsewhere")})
    first, second = (load_dataset(str(tars), config) for config in (cache, elsewhere))
    assert first.fingerprint == second.fingerprint and isinstance(first, Manifest)
