"""Builds from a real table: the same bytes whatever happened on the way, and every failure counted with its reason."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from processes import is_running, list_children

from data_tools import plan as plans
from data_tools.__main__ import main
from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.image import ImagePolicy
from data_tools.info import print_info
from data_tools.shards import Manifest, ShardReader
from data_tools.sources import open_source


def read_samples(out: Path) -> list[dict]:
    """Each sample's json with its jpg and txt, in order."""
    manifest = Manifest.load(out)
    reader = ShardReader(manifest)
    raw = [reader.read(number) for number in range(len(reader))]
    return [
        {**json.loads(sample.fields["json"]), "jpg": sample.fields["jpg"], "txt": sample.fields["txt"].decode()}
        for sample in raw
    ]


def read_rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_a_build_holds_the_table(tmp_path, write_table):
    table, images = write_table(10)
    manifest = build_shards(
        table, tmp_path / "out", images, samples_per_shard=4, images=ImagePolicy(resize=32), processes=1
    )
    assert (manifest.samples, manifest.captions, manifest.failures) == (10, 20, 0)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    samples = read_samples(tmp_path / "out")
    assert [sample["source"] for sample in samples] == [f"picture {number}.jpg" for number in range(10)]
    assert [sample["key"] for sample in samples[3:5]] == ["000000003", "000010000"]
    assert samples[7]["captions"] == ["caption 7 one", "caption 7 two"]
    assert samples[7]["txt"] == "caption 7 one"
    assert (samples[7]["width"], samples[7]["height"]) == (32, 33)
    assert (samples[7]["original_width"], samples[7]["original_height"]) == (64, 66)


def test_the_sidecar_points_at_the_bytes(tmp_path, write_table):
    table, images = write_table(5)
    build_shards(table, tmp_path / "out", images, samples_per_shard=3, processes=1)
    for row, sample in zip(read_rows(tmp_path / "out"), read_samples(tmp_path / "out"), strict=True):
        assert (row["key"], row["status"], row["error"]) == (sample["key"], "success", None)
        assert row["sha256"] == sample["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
        assert (row["captions"], row["caption"]) == (sample["captions"], sample["txt"])
        with open(tmp_path / "out" / f"{row['key'][:5]}.tar", "rb") as file:
            file.seek(row["offset"])
            part = file.read(row["size"])
        assert part.startswith(f"{row['key']}.jpg\0".encode()) and sample["jpg"] in part


def test_the_bytes_do_not_depend_on_the_processes(tmp_path, write_table, read_folder):
    table, images = write_table(30)
    for processes in (1, 2):
        build_shards(table, tmp_path / str(processes), images, samples_per_shard=4, processes=processes, seed=7)
    assert read_folder(tmp_path / "1") == read_folder(tmp_path / "2")
    sources = [sample["source"] for sample in read_samples(tmp_path / "1")]
    assert sorted(sources) != sources and len(set(sources)) == 30
    build_shards(table, tmp_path / "other", images, samples_per_shard=4, processes=1, seed=8)
    assert sources != [sample["source"] for sample in read_samples(tmp_path / "other")]


def read_summary(printed: str) -> dict[str, str]:
    """The closing table: what a number is of, and the number."""
    return dict(re.findall(r"^ *(\S+(?: \S+)*?) {2,}([\d,]+)(?: |$)", printed, re.MULTILINE))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for orphans in /proc")
def test_a_killed_build_ends_with_the_same_bytes(tmp_path, write_table, read_folder, start_data_tools, run_data_tools):
    table, images = write_table(120, size=400)
    options = ["--image-root", images, "--samples-per-shard", 10, "--resize", 300, "--processes", 2]
    out = tmp_path / "out"
    process = start_data_tools("build", table, out, *options)
    wait_for(out / "00002_stats.json", process)
    children = list_children(process.pid)
    process.kill()
    process.wait()
    assert len(children) >= 2
    deadline_s = time.monotonic() + 10
    while any(map(is_running, children)):
        assert time.monotonic() < deadline_s, "workers outlive a killed parent"
        time.sleep(0.01)
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="is it a finished build"):
        Manifest.load(out)
    # A worker that was killed itself would have left such a file, and power may fail between a shard's files.
    (out / "00011.tar.0123abcd.tmp").write_bytes(b"half")
    (out / "00002_stats.json").unlink()

    again = run_data_tools("build", table, out, *options)
    assert again.returncode == 0, again.stderr
    assert "going on," in again.stdout
    assert read_summary(again.stdout) | {"samples": "120", "captions": "240"} == read_summary(again.stdout)
    build_shards(table, tmp_path / "whole", images, samples_per_shard=10, images=ImagePolicy(resize=300), processes=1)
    assert read_folder(out) == read_folder(tmp_path / "whole")

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    once_more = run_data_tools("build", table, out, *options)
    assert (once_more.returncode, once_more.stderr) == (0, "")
    assert "this build is finished already, with 120 samples" in once_more.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_cleanly(tmp_path, write_table, start_data_tools, processes):
    table, images = write_table(120, size=400)
    options = ["--image-root", images, "--samples-per-shard", 10, "--resize", 300, "--processes", processes]
    process = start_data_tools("build", table, tmp_path / "out", *options)
    wait_for(tmp_path / "out" / "00001_stats.json", process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted. Run the same command again to go on"
    assert "Traceback" not in stderr
    assert [path.name for path in (tmp_path / "out").glob("*.tmp")] == ["plan.tmp"]  # to go on from


FULL_DISK = """
set -e
mount -t tmpfs -o size=2000k tmpfs "$1"
head -c 1700k /dev/zero > "$1/filler"
set +e
"$2" -m data_tools build "$3" "$1/out" --image-root "$4" --samples-per-shard 10 --processes 2
echo "first $?"
ls "$1/out"
rm "$1/filler"
"$2" -m data_tools build "$3" "$1/out" --image-root "$4" --samples-per-shard 10 --processes 2
echo "second $?"
cp -r "$1/out" "$5"
"""


def test_a_full_disk_stops_and_a_second_run_goes_on(tmp_path, write_table, read_folder):
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a mount namespace of its own for a small file system")
    table, images = write_table(100)
    (tmp_path / "disk").mkdir()
    places = [tmp_path / "disk", sys.executable, table, images, tmp_path / "copy"]
    command = [*unshare, "sh", "-c", FULL_DISK, "sh", *map(str, places)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    if "mount:" in run.stderr:
        pytest.skip("may not mount a small file system")
    first, _, second = run.stdout.partition("first 1\n")
    assert second.endswith("second 0\n"), run
    assert "the disk is full. Free space and run the same command again" in run.stderr
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1
    assert ".tmp" not in second.replace("plan.tmp", "") and "manifest.json" not in second and "going on" in second
    build_shards(table, tmp_path / "whole", images, samples_per_shard=10, processes=1)
    assert read_folder(tmp_path / "copy") == read_folder(tmp_path / "whole")


def test_rows_of_one_image_become_one_sample_wherever_they_stand(tmp_path, write_table, capsys):
    _, images = write_table(3)
    rows = [
        ("picture 1.jpg", 'a 6" nail'),
        ("picture 0.jpg", "zero"),
        ("picture 1.jpg", "  "),
        ("picture 2.jpg", ""),
        ("picture 1.jpg", "another"),
    ]
    table = tmp_path / "scattered.tsv"
    table.write_text("filename\tcaption\n" + "".join(f"{name}\t{caption}\n" for name, caption in rows))
    manifest = build_shards(table, tmp_path / "out", images, processes=1)
    assert (manifest.samples, manifest.captions, manifest.failures) == (2, 3, 1)
    assert [sample["captions"] for sample in read_samples(tmp_path / "out")] == [['a 6" nail', "another"], ["zero"]]
    assert [row["error"] for row in read_rows(tmp_path / "out")] == [None, None, "no caption: empty caption"]
    assert json.loads((tmp_path / "out" / "00000_stats.json").read_bytes())["refused_captions"] == {"empty caption": 2}
    printed = capsys.readouterr().out
    assert read_summary(printed) | {"failures": "1", "no caption": "1", "captions refused": "2"} == read_summary(
        printed
    )
    assert "see the error column of the .parquet files" in printed and "empty caption" in printed


def test_pictures_that_cannot_be_used_are_failures_with_a_reason(tmp_path, write_table):
    table, images = write_table(4)
    (tmp_path / "secret.jpg").write_bytes((images / "picture 0.jpg").read_bytes())
    (images / "picture 1.jpg").write_bytes((images / "picture 1.jpg").read_bytes()[:900])
    (images / "picture 2.jpg").write_bytes(b"<html>")
    names = ["none.jpg", "../secret.jpg", str(tmp_path / "secret.jpg")]
    table.write_text(table.read_text() + "".join(f"{name}\tcaption\n" for name in names))
    out = tmp_path / "out"
    manifest = build_shards(table, out, images, samples_per_shard=2, processes=1)
    rows = read_rows(out)
    assert [(row["error"] or "fine").partition(":")[0] for row in rows] == [
        "fine",
        "damaged picture",
        "not a picture",
        "fine",
        "missing picture",
        "image name leads out of the image root",
        "image name leads out of the image root",
    ]
    assert [row["key"] for row in rows] == [f"{place // 2:05d}{place % 2:04d}" for place in range(7)]
    assert (manifest.samples, manifest.failures) == (2, 5)
    assert [shard.samples for shard in manifest.shards] == [1, 1, 0, 0]
    with tarfile.open(out / "00003.tar") as archive:
        assert archive.getnames() == []
    assert [sample["source"] for sample in read_samples(out)] == ["picture 0.jpg", "picture 3.jpg"]


def test_a_keep_list_makes_a_split(tmp_path, write_table, capsys):
    table, images = write_table(6)
    keep = tmp_path / "keep.txt"
    keep.write_text("picture 4.jpg\r\npicture 1.jpg\nabsent.jpg\n\n")
    build_shards(table, tmp_path / "out", images, keep_list=keep, processes=1)
    assert [sample["source"] for sample in read_samples(tmp_path / "out")] == ["picture 1.jpg", "picture 4.jpg"]
    assert "warning:" in (text := capsys.readouterr().err)
    assert "1 of 3 names of --keep-list are not in it (first: absent.jpg)" in text
    keep.write_text("absent.jpg\n")
    with pytest.raises(UserError, match="none of the 1 names of --keep-list"):
        build_shards(table, tmp_path / "other", images, keep_list=keep, processes=1)
    keep.write_text("\n")
    with pytest.raises(UserError, match="the list is empty"):
        build_shards(table, tmp_path / "other", images, keep_list=keep, processes=1)


def test_another_build_is_not_mixed_in(tmp_path, write_table, read_folder):
    table, images = write_table(4)
    out = tmp_path / "out"
    build_shards(table, out, images, samples_per_shard=2, processes=1)
    before = read_folder(out)
    with pytest.raises(
        UserError, match="holds a build with seed None, not 1; images.resize 256, not 32. Give the same"
    ):
        build_shards(table, out, images, samples_per_shard=2, images=ImagePolicy(resize=32), seed=1, processes=1)
    table.write_text(table.read_text().replace("one", "eins"))
    with pytest.raises(UserError, match="holds a build with input_sha256"):
        build_shards(table, out, images, samples_per_shard=2, processes=1)
    assert read_folder(out) == before

    (out / "notes.txt").write_text("mine")
    manifest = build_shards(table, out, images, samples_per_shard=4, processes=1, restart=True)
    assert [shard.name for shard in manifest.shards] == ["00000.tar"]
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob("00001*"))

    (out / "manifest.json").unlink()
    (out / "00009.tar").write_bytes(b"of somebody else")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"holds tars of another build \(such as 00009.tar\)"):
            build_shards(table, out, images, samples_per_shard=4, processes=1, restart=restart)
    assert (out / "00009.tar").read_bytes() == b"of somebody else"


def test_a_folder_of_other_things_is_not_touched(tmp_path, write_table, read_folder):
    table, images = write_table(2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"of somebody else")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"holds files but no build \(such as 00000.tar\)"):
            build_shards(table, out, images, processes=1, restart=restart)
    (out / "build.json").write_text('{"id": 3}')
    with pytest.raises(UserError, match="not the state of a build that this version knows"):
        build_shards(table, out, images, processes=1, restart=True)
    assert read_folder(out) == {"00000.tar": b"of somebody else", "build.json": b'{"id": 3}'}


def test_input_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, write_table):
    table, images = write_table(2)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such folder. Give the folder of the pictures"):
        build_shards(table, out, tmp_path / "none")
    with pytest.raises(UserError, match="no column 'text'. The columns are: filename, caption"):
        build_shards(table, out, images, caption_column="text")
    with pytest.raises(UserError, match="none of the first 2 pictures is here"):
        build_shards(table, out, tmp_path)
    with pytest.raises(UserError, match="--samples-per-shard 0"):
        build_shards(table, out, images, samples_per_shard=0)
    with pytest.raises(UserError, match="--processes -1"):
        build_shards(table, out, images, processes=-1)
    table.write_text("filename\tcaption\n")
    with pytest.raises(UserError, match="no rows"):
        build_shards(table, out, images)
    with pytest.raises(UserError, match="none.tsv: no such file or folder"):
        build_shards(tmp_path / "none.tsv", out, images)
    assert not out.exists() or os.listdir(out) == []


def test_damaged_shards_are_made_again(tmp_path, write_table, read_folder):
    """As the errors of `Manifest.load` advise: delete the manifest, run the same build again."""
    table, images = write_table(6)
    out = tmp_path / "out"
    build_shards(table, out, images, samples_per_shard=2, processes=1)
    before = read_folder(out)
    (out / "00000.tar.idx").write_bytes(bytes(24))
    (out / "00001.tar").write_bytes(b"short")
    (out / "00002_stats.json").write_bytes(b"")
    with pytest.raises(UserError, match="00001.tar: 5 bytes"):
        build_shards(table, out, images, samples_per_shard=2, processes=1)
    (out / "manifest.json").unlink()
    build_shards(table, out, images, samples_per_shard=2, processes=1)
    assert read_folder(out) == before


def test_no_sample_is_no_build(tmp_path, write_table):
    table, images = write_table(2)
    for number in range(2):
        (images / f"picture {number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"not one of 2 samples could be made \(not a picture 2\)"):
        build_shards(table, tmp_path / "out", images, processes=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_info_fits_a_terminal(tmp_path, write_table, capsys):
    table, images = write_table(3)
    table.write_text(table.read_text() + "none.jpg\tx\n" + "picture 0.jpg\t" + "long " * 40 + "\n")
    build_shards(table, tmp_path / "out", images, processes=1)
    capsys.readouterr()
    print_info(tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    text = "\n".join(lines)
    assert "captions     7 (images with so many captions: 2: 2, 3: 1)" in text
    assert "height px    min 64, median 65, p95 66, max 66" in text
    assert "failures     1 (missing picture 1)" in text
    assert "  caption 0 one" in lines


def test_rows_too_long_for_the_usual_memory_get_more(tmp_path, monkeypatch):
    table = tmp_path / "table.tsv"
    table.write_text("filename\tcaption\n" + "".join(f"{n}.jpg\t{n} {'long ' * 3000}\n" for n in range(500)))
    source = open_source(str(table))
    monkeypatch.setattr("data_tools.plan.PLAN_MEMORY", ("3MB", "200MB"))
    plan = plans.load_or_make_plan(source, tmp_path / "plan", "build", 100, None, None)
    assert [sample.source for number in range(5) for sample in plans.read_samples(plan.path(number))] == [
        f"{number}.jpg" for number in range(500)
    ]
    assert sorted(os.listdir(tmp_path / "plan")) == [*(f"{number:05d}.parquet" for number in range(5)), "plan.json"]
    monkeypatch.setattr("data_tools.plan.PLAN_MEMORY", ("3MB",))
    with pytest.raises(UserError, match="table.tsv: its rows are so long that they cannot be put in order in 3MB"):
        plans.load_or_make_plan(source, tmp_path / "other", "build", 100, None, None)


@pytest.mark.parametrize(("check", "failures"), [("full", 1), ("structure", 0)])
def test_how_copies_are_checked_is_chosen(tmp_path, write_table, check, failures):
    table, images = write_table(3, size=200)
    data = (images / "picture 1.jpg").read_bytes()
    middle = len(data) // 2
    (images / "picture 1.jpg").write_bytes(data[:middle] + data[middle + 3000 :])
    build = ["build", table, tmp_path / "out", "--image-root", images, "--processes", 1, "--check", check]
    assert main([str(argument) for argument in build]) == 0
    assert Manifest.load(tmp_path / "out").failures == failures
