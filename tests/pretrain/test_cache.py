"""The cache of remote shards: right bytes whatever the store does, one download a machine, a limit, nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from stores import HttpStore, serve, wait_for, write_shards

from data_tools.errors import UserError
from data_tools.files import open_folder
from data_tools.shards import Manifest, ShardError, ShardReader
from pretrain.data.cache import CacheConfig, CachedFolder, CachedReader, ReaderClosed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def store(data: Path):
    with serve(data) as store:
        yield store


@pytest.fixture
def open_reader(tmp_path: Path):
    readers = []

    def open_it(url: str, **options) -> CachedReader:
        config = make_config(tmp_path, **options)
        manifest = Manifest.load(CachedFolder(url, config))
        readers.append(CachedReader(manifest, config))
        return readers[-1]

    yield open_it
    for reader in readers:
        reader.close()


def make_config(tmp_path: Path, **options) -> CacheConfig:
    values = {"folder": str(tmp_path / "cache"), "timeout_s": 0.3, "retry_for_s": 5.0, "download_threads": 2}
    return CacheConfig(**values | options)


def read_all(reader: ShardReader) -> list:
    return [reader.read(index) for index in range(len(reader))]


def names(tmp_path: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix == suffix)


def test_a_remote_dataset_is_the_local_one_and_each_shard_is_fetched_once(tmp_path, data, store, open_reader):
    local = read_all(ShardReader(Manifest.load(data)))
    for _ in range(2):  # the second time with what the first has left
        reader = open_reader(store.url)
        assert read_all(reader) == local
        assert [reader.read_selected(1, place) for place in range(4)] == local[4:8]
        reader.close()
    assert sorted(store.fetched()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(store.fetched(".idx")) == ["00000.tar.idx", "00001.tar.idx", "00002.tar.idx"]
    assert len(names(tmp_path, ".tar")) == 3 and not names(tmp_path, ".part")


def test_memory_and_other_stores_without_an_event_loop_work(tmp_path, data, open_reader):
    url = f"memory://{tmp_path.name}"
    folder = open_folder(url)
    for path in data.iterdir():
        folder._fs.pipe_file(f"{folder._root}/{path.name}", path.read_bytes())
    assert read_all(open_reader(url)) == read_all(ShardReader(Manifest.load(data)))
    folder._fs.rm(folder._root, recursive=True)


@pytest.mark.parametrize("options", [{"listing": False}, {"ranges": False}])
def test_servers_that_do_not_list_or_know_no_ranges(data, open_reader, options):
    with serve(data, **options) as store:
        reader = open_reader(store.url)
        assert read_all(reader) == read_all(ShardReader(Manifest.load(data)))
        reader.close()


@pytest.mark.parametrize("faults", [["stall"], ["drip"], ["drop", "drop"], [500, 503], [429]])
def test_what_a_store_does_to_a_request_does_not_change_the_data(data, store, open_reader, faults):
    reader = open_reader(store.url)
    store.faults.extend(faults)
    assert read_all(reader) == read_all(ShardReader(Manifest.load(data)))
    assert not store.faults


def test_a_slow_link_is_asked_for_less_at_a_time(tmp_path, monkeypatch, open_reader):
    write_shards(tmp_path / "large", shards=1, samples=2, size=400_000)
    with serve(tmp_path / "large") as store:
        reader = open_reader(store.url)
        answer, sizes = HttpStore._send, []

        def send_slowly(self, request, status, body, headers):
            sizes.append(len(body))
            time.sleep(0.5 if len(body) > 200_000 else 0)
            answer(self, request, status, body, headers)

        monkeypatch.setattr(HttpStore, "_send", send_slowly)
        monkeypatch.setattr("pretrain.data.cache._REQUEST_BYTES", 400_000)
        assert len(reader.read(1).fields["jpg"]) == 400_017
        assert 400_000 in sizes and 200_000 in sizes


def test_a_shard_that_is_not_there_is_a_bad_sample_until_it_is_put_back(tmp_path, data, store, open_reader):
    reader = open_reader(store.url, retry_for_s=0.5)
    os.rename(data / "00001.tar", tmp_path / "aside")
    for _ in range(3):
        with pytest.raises(ShardError, match=r"00001\.tar: the store has no such file"):
            reader.read(4)
    assert store.fetched().count("00001.tar") == 1
    assert reader.read(0).key == "0_0" and reader.read(11).key == "2_3"
    os.rename(tmp_path / "aside", data / "00001.tar")
    time.sleep(0.5)
    assert reader.read(4).key == "1_0"


def test_an_index_that_is_not_there_makes_bad_samples(tmp_path, data, store, open_reader):
    reader = open_reader(store.url)
    (data / "00001.tar.idx").unlink()
    for name in names(tmp_path, ".idx"):
        (tmp_path / "cache" / name).unlink()
    reader.prefetch([1])
    for _ in range(3):
        with pytest.raises(ShardError, match=r"00001\.tar: its index is not there: http.*00001\.tar\.idx"):
            reader.read(4)
    assert reader.read(0).key == "0_0"


@pytest.mark.parametrize("change", [-700, 700])
@pytest.mark.parametrize("limit_gib", [1.0, 1e-6])
def test_a_shard_of_another_size_is_a_bad_sample(data, store, open_reader, change, limit_gib):
    reader = open_reader(store.url, limit_gib=limit_gib)
    content = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(ShardError, match="the store's file is not of"):
        reader.read(4)
    assert reader.read(0).key == "0_0"


def test_a_server_that_comes_back_is_waited_for(data, store, open_reader, caplog):
    reader = open_reader(store.url)
    assert reader.read(0).key == "0_0"
    store.stop()
    threading.Timer(1.0, store.start).start()
    assert reader.read(4).key == "1_0"
    assert "Trying again for" in caplog.text


def test_a_server_that_has_gone_ends_in_one_line(data, store, open_reader):
    reader = open_reader(store.url, retry_for_s=0.6)
    assert reader.read(0).key == "0_0"
    store.stop()
    start_s = time.monotonic()
    with pytest.raises(UserError) as caught:
        reader.read(4)
    assert not isinstance(caught.value, ShardError) and 0.5 < time.monotonic() - start_s < 3
    text = str(caught.value)
    assert (
        "/00001.tar" in text and "Given up after 1 s" in text and "data.cache.retry_for_s" in text and "\n" not in text
    )


def test_a_refusal_at_the_start_is_not_tried_again(data, store, tmp_path):
    store.always = 403
    start_s = time.monotonic()
    with pytest.raises(UserError, match="403 Forbidden. Check the URL, and the rights"):
        Manifest.load(CachedFolder(store.url, make_config(tmp_path)))
    assert time.monotonic() - start_s < 1


def test_wanted_shards_are_there_before_they_are_read(tmp_path, data, store, open_reader):
    reader = open_reader(store.url, download_threads=1)
    reader.prefetch([2, 0])
    wait_for(lambda: len(reader._open_shards) == 2)
    assert store.fetched() == ["00002.tar", "00000.tar"]
    store.stop()
    assert [reader.read(index).key for index in (0, 11)] == ["0_0", "2_3"]


def test_the_limit_holds_and_the_longest_unused_goes_first(tmp_path, data, store, open_reader):
    size = (data / "00000.tar").stat().st_size
    reader = open_reader(store.url, limit_gib=2.2 * size / 2**30)
    (tmp_path / "cache" / "mine.tar").write_bytes(bytes(10 * size))  # of somebody else: not counted, never removed
    sizes = []
    for number in (0, 1, 0, 2, 0, 1):
        reader.read_place(number, 0)
        reader.prefetch([])  # nothing is wanted any more
        sizes.append(sum((tmp_path / "cache" / name).stat().st_size for name in names(tmp_path, ".tar")) - 10 * size)
        time.sleep(0.01)
    assert max(sizes) <= 2.2 * size
    assert store.fetched() == ["00000.tar", "00001.tar", "00002.tar", "00001.tar"]  # 0 was never evicted
    assert (tmp_path / "cache" / "mine.tar").exists()


def test_shards_that_are_wanted_are_not_evicted_for_others(tmp_path, data, store, open_reader, caplog):
    size = (data / "00000.tar").stat().st_size
    reader = open_reader(store.url, limit_gib=2.2 * size / 2**30)
    reader.prefetch([0, 1, 2])
    wait_for(lambda: len(reader._open_shards) == 2)
    for _ in range(2):
        expected = [f"{number}_{place}" for number in range(3) for place in range(4)]
        assert [sample.key for sample in read_all(reader)] == expected
    requests = store.fetched()
    assert (requests.count("00000.tar"), requests.count("00001.tar")) == (1, 1)
    assert caplog.text.count("sample by sample") == 1


def test_a_limit_below_one_shard_reads_by_ranges(tmp_path, data, store, open_reader):
    reader = open_reader(store.url, limit_gib=1e-6)
    assert read_all(reader) == read_all(ShardReader(Manifest.load(data)))
    assert not names(tmp_path, ".tar") and not names(tmp_path, ".part")


def test_a_reader_keeps_reading_what_somebody_deletes(tmp_path, data, store, open_reader):
    reader = open_reader(store.url)
    assert reader.read(0).key == "0_0"
    shutil.rmtree(tmp_path / "cache")
    assert [reader.read(index).key for index in (1, 4)] == ["0_1", "1_0"]


def test_a_file_of_the_wrong_size_is_not_trusted(tmp_path, data, store, open_reader):
    open_reader(store.url).read(0)
    (name,) = names(tmp_path, ".tar")
    with open(tmp_path / "cache" / name, "ab") as file:
        file.truncate(1000)
    assert open_reader(store.url).read(0).key == "0_0"


def test_a_rebuilt_dataset_does_not_get_the_old_shards(tmp_path, data, store, open_reader):
    open_reader(store.url).read(0)
    shutil.rmtree(data)
    write_shards(data, size=3100)
    assert len(open_reader(store.url).read(0).fields["jpg"]) == 3100


def test_threads_that_read_at_random_with_little_room(tmp_path, open_reader):
    local = read_all(ShardReader(write_shards(tmp_path / "many", shards=8)))
    size = (tmp_path / "many" / "00000.tar").stat().st_size
    with serve(tmp_path / "many") as store:
        reader = open_reader(store.url, limit_gib=3.5 * size / 2**30, timeout_s=20.0)
        store.faults.extend([500, "drop", 503])
        wrong = []

        def read(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for step in range(40):
                if seed == 0:
                    reader.prefetch([step // 5, step // 5 + 1][: 8 - step // 5])
                index = int(generator.integers(len(local)))
                if reader.read(index) != local[index]:
                    wrong.append(index)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        reader.close()
    assert sum((tmp_path / "cache" / name).stat().st_size for name in names(tmp_path, ".tar")) <= 3.5 * size
    assert not names(tmp_path, ".part")


def test_the_folder_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which the standard says is to be ignored")
    assert str(CacheConfig().locate()) == "/home/someone/.cache/image-text-pretrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert str(CacheConfig().locate()) == "/scratch/image-text-pretrain"
    assert str(CacheConfig(folder="~/shards").locate()) == "/home/someone/shards"


def test_a_folder_that_cannot_be_used_is_refused(tmp_path, data, store):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"cache: the cache of remote shards cannot be kept here: .* data\.cache\.folder"
    ):
        CachedReader(Manifest.load(open_folder(f"file://{data}")), make_config(tmp_path))


def test_close_ends_what_is_under_way_and_leaves_nothing(tmp_path, data, store, open_reader):
    before = set(threading.enumerate())
    reader = open_reader(store.url, timeout_s=60.0)
    store.faults.extend(["stall"] * 5)
    caught = []

    def read() -> None:
        try:
            reader.read(0)
        except ReaderClosed as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    reader.prefetch([1, 2])
    wait_for(lambda: len(store.faults) == 2)
    start_s = time.monotonic()
    reader.close()
    thread.join(5)
    assert len(caught) == 1 and time.monotonic() - start_s < 2
    assert not names(tmp_path, ".part") and not names(tmp_path, ".tar")
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("fetch ")]
    assert not left
    with pytest.raises(ReaderClosed):
        reader.read(0)


READ = """
import sys
from data_tools.shards import Manifest
from pretrain.data.cache import CacheConfig, CachedFolder, CachedReader
url, folder, limit = sys.argv[1:]
config = CacheConfig(folder=folder, limit_gib=float(limit), timeout_s=30.0, retry_for_s=30.0)
reader = CachedReader(Manifest.load(CachedFolder(url, config)), config)
print(*(reader.read(index).key for index in range(len(reader))))
reader.close()
"""


def start_reading(tmp_path: Path, url: str, limit_gib: float = 1.0) -> subprocess.Popen:
    command = [sys.executable, "-c", READ, url, str(tmp_path / "cache"), str(limit_gib)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_fetch_a_shard_once_between_them(tmp_path, data, store):
    processes = [start_reading(tmp_path, store.url) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert {output for output, _ in outputs} == {" ".join(f"{n}_{p}" for n in range(3) for p in range(4)) + "\n"}, (
        outputs
    )
    assert sorted(store.fetched()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert not names(tmp_path, ".part")


def test_what_a_killed_process_leaves_is_not_trusted_and_removed(tmp_path, data, store, open_reader):
    store.faults.extend(["drop", "stall"])
    process = start_reading(tmp_path, store.url)
    wait_for(lambda: not store.faults, 30)
    wait_for(lambda: names(tmp_path, ".part"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(tmp_path, ".part")) == 1 and not names(tmp_path, ".tar")
    reader = open_reader(store.url)
    assert not names(tmp_path, ".part")
    assert reader.read(0).key == "0_0"


FULL_DISK = """
set -e
cache="$1" filler="$2"
shift 2
mount -t tmpfs -o size=600k tmpfs "$cache"
head -c "$filler" /dev/zero > "$cache/filler"
"$@"
ls -l "$cache"
"""


@pytest.mark.parametrize(
    ("filler", "limit_gib", "cached_shards"),
    [("0", "1.0", 2), ("0", "0.0005", 2), ("500k", "1.0", 0)],
    ids=["full", "full at the limit", "full of other things"],
)
def test_a_full_disk_evicts_and_then_reads_by_ranges(tmp_path, filler, limit_gib, cached_shards):
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a mount namespace of its own for a small file system")
    write_shards(tmp_path / "data", shards=4, samples=2, size=110_000)
    (tmp_path / "cache").mkdir()
    reading = [sys.executable, "-c", READ, f"file://{tmp_path / 'data'}", str(tmp_path / "cache"), limit_gib]
    command = [*unshare, "sh", "-c", FULL_DISK, "sh", str(tmp_path / "cache"), filler, *reading]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    if "mount:" in run.stderr:
        pytest.skip("may not mount a small file system")
    assert run.returncode == 0, run
    keys, *listing = run.stdout.splitlines()
    assert keys == " ".join(f"{number}_{place}" for number in range(4) for place in range(2))
    assert sum(line.endswith(".tar") for line in listing) == cached_shards and ".part" not in run.stdout
    assert run.stderr.count("its disk is full") == (cached_shards == 0)
