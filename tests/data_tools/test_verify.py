"""Damage of every kind is found, and named by shard and key; what is put into quarantine is left out by readers."""

import json
import os
import random
import shutil
import tarfile

import numpy as np
import pytest
import tending
from tending import encode_noise, make_dataset

from data_tools.errors import UserError
from data_tools.folder import write_sidecar
from data_tools.index import index_tars
from data_tools.shards import Manifest, ShardReader
from data_tools.verify import Verdict, verify_dataset
from data_tools.view import make_view

SAMPLES, FAILURES = (4, 3), 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "data"
    make_dataset(folder, SAMPLES, FAILURES)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


def verify(folder, **options) -> Verdict:
    return verify_dataset(folder, processes=1, **options)


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def list_parts(folder) -> dict[str, tuple[str, int, int, str | None]]:
    """Parts of the dataset where a bit can flip: (file, first byte, end, key of the sample)."""
    parts = {}
    for shard in ("00000", "00001"):
        with tarfile.open(folder / f"{shard}.tar") as archive:
            members = archive.getmembers()
        for member in members:
            key, extension = member.name.split(".")
            data_end = member.offset_data + member.size
            end = -(-data_end // 512) * 512
            parts[f"{member.name} header"] = (f"{shard}.tar", member.offset, member.offset_data, key)
            parts[f"{member.name} data"] = (f"{shard}.tar", member.offset_data, data_end, key)
            if end > data_end:
                parts[f"{member.name} padding"] = (f"{shard}.tar", data_end, end, key)
        parts[f"{shard} end"] = (f"{shard}.tar", end, end + 1024, None)
        for suffix in (".tar.idx", ".parquet", "_stats.json"):
            parts[shard + suffix] = (shard + suffix, 0, os.path.getsize(folder / (shard + suffix)), None)
    for name in ("sizes.json", "manifest.json", "checksums.json"):
        parts[name] = (name, 0, os.path.getsize(folder / name), None)
    return parts


def test_all_is_well(whole, capsys):
    before = {name: (whole / name).read_bytes() for name in os.listdir(whole)}
    for decode in (False, True):
        verdict = verify_dataset(whole, decode, processes=2)
        assert verdict and verdict.problems == ()
        assert "all is well: 7 samples, " in capsys.readouterr().out
    assert before == {name: (whole / name).read_bytes() for name in os.listdir(whole)}


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_is_found_wherever_it_is(folder, seed):
    """One bit at random in each header, picture, text, padding and in every small file."""
    draw = random.Random(seed)
    for part, (file, start, end, key) in list_parts(folder).items():
        bit = draw.randrange(8 * start, 8 * end)
        flip(folder / file, bit)
        problems = verify(folder).problems
        assert {problem.file for problem in problems} == {file}, (part, bit, problems)
        if key is not None:
            assert [(problem.shard, problem.key) for problem in problems] == [(file, key)], (part, bit, problems)
            place = int(key[-4:]) - FAILURES
            assert problems[0].place == place
        elif file.startswith("0000"):
            assert {(problem.shard, problem.place) for problem in problems} == {(file[:5] + ".tar", None)}, (part, bit)
        flip(folder / file, bit)
    assert verify(folder)


def test_what_build_wrote_is_verified_to_the_bit(tmp_path, noise):
    """With columns of every kind that the input has besides ours, whose json and sidecar must be held to agree."""
    from data_tools.build import build_shards

    lines = ["image\tcaption\tscore\tcount\twidth\tlicence"]
    for number in range(6):
        noise(40, 40, number).save(tmp_path / f"{number}.jpg")
        licence = "" if number == 2 else f"cc {number}"
        lines.append(f"{number}.jpg\tcaption «{number}»\t{number / 7}\t{number}\t{number}\t{licence}")
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    options = {"image_column": "image", "caption_column": "caption", "samples_per_shard": 3, "processes": 1}
    build_shards(tmp_path / "t.tsv", out, tmp_path, **options)
    assert verify(out, decode=True)
    with tarfile.open(out / "00001.tar") as archive:
        members = archive.getmembers()
    draw = random.Random(0)
    for member in members:
        key, extension = member.name.split(".")
        for _ in range(20 if extension == "json" else 2):
            bit = draw.randrange(8 * member.offset_data, 8 * (member.offset_data + member.size))
            flip(out / "00001.tar", bit)
            assert [(problem.file, problem.key) for problem in verify(out).problems] == [("00001.tar", key)], bit
            flip(out / "00001.tar", bit)


def test_bits_all_over_the_small_files_count(tmp_path):
    make_dataset(tmp_path, (1,), failures=0)
    for name in ("00000.tar.idx", "sizes.json", "checksums.json", "00000_stats.json"):
        for byte in range(0, os.path.getsize(tmp_path / name), 3):
            bit = byte * 8 + byte % 8
            flip(tmp_path / name, bit)
            problems = verify(tmp_path).problems
            assert [problem.file for problem in problems] == [name], (name, bit, problems)
            flip(tmp_path / name, bit)


@pytest.mark.parametrize("name", ["00001.tar", "00001.tar.idx", "00001.parquet", "00001_stats.json", "sizes.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    problem, *others = verify(folder).problems
    assert (problem.file, others) == (name, [])
    assert "missing" in problem.text or name == "sizes.json"


def test_a_folder_without_its_manifest_is_verified_by_the_rest(folder):
    flip(folder / "00001.tar", 8 * 700)
    (folder / "manifest.json").unlink()
    problems = {problem.file: problem for problem in verify(folder).problems}
    assert problems.keys() == {"manifest.json", "00001.tar"}
    assert problems["00001.tar"].key == "000010001"
    for name in ("00000_stats.json", "00001_stats.json", "checksums.json"):
        (folder / name).unlink()
    assert {problem.file for problem in verify(folder).problems} == {"manifest.json", "00001.tar"}


def test_without_checksums_the_sidecars_are_held_against_the_tars(folder, capsys):
    (folder / "checksums.json").unlink()
    assert verify(folder)
    assert "without checksums.json" in capsys.readouterr().out
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "00000.parquet")
    for column, value, text in [
        ("key", "000000009", "its key is not that of the sidecar, 000000009"),
        ("sha256", "00", "the SHA-256 differs from the sidecar's"),
        ("offset", 512, "the sidecar says 512"),
        ("status", "failure", "tells of 3 samples, manifest.json of 4"),
    ]:
        rows = table.to_pylist()
        rows[2][column] = value
        write_sidecar(Manifest.load(folder).directory, "00000.tar", rows, table.schema)
        (problem,) = verify(folder).problems
        assert problem.file == "00000.parquet" and text in problem.text
        assert problem.key == (None if column == "status" else "000000002")


def test_damage_in_two_samples_of_a_shard_is_told_of_both(folder):
    parts = list_parts(folder)
    for part in ("000000001.txt data", "000000003.jpg header"):
        flip(folder / "00000.tar", 8 * parts[part][1] + 3)
    assert [(problem.place, problem.key) for problem in verify(folder).problems] == [(0, "000000001"), (2, "000000003")]


def test_a_picture_that_does_not_decode_is_found_by_decoding(tmp_path, monkeypatch):
    original = tending.encode_noise
    monkeypatch.setattr(
        tending,
        "encode_noise",
        lambda seed, width: original(seed, width)[: -40 if seed == 1 else None],  # the second lacks its end
    )
    make_dataset(tmp_path / "other", (3,))
    assert verify(tmp_path / "other")
    (problem,) = verify(tmp_path / "other", decode=True).problems
    assert (problem.key, problem.text) == ("000000002", "its picture cannot be decoded (ValueError)")


def keys_of(place) -> list[str]:
    reader = ShardReader(Manifest.load(place))
    return [reader.read(number).key for number in range(len(reader))]


ALL = ["000000001", "000000002", "000000003", "000000004", "000010001", "000010002", "000010003"]


def test_a_damaged_sample_goes_into_quarantine(folder, tmp_path, capsys):
    make_view(folder, tmp_path / "view", "width > 40")
    flip(folder / "00000.tar", 8 * list_parts(folder)["000000002.json data"][1] + 40)
    verdict = verify(folder, quarantine=True)
    assert not verdict and verdict.newly_quarantined == 1
    entries = json.loads((folder / "quarantine.json").read_text())
    assert entries == {"00000.tar": {"1": "000000002: its json is not what the sidecar says"}}
    assert keys_of(folder) == [key for key in ALL if key != "000000002"]
    assert keys_of(tmp_path / "view") == ALL[2:]
    capsys.readouterr()
    again = verify(folder)
    assert again and again.quarantined == 1
    assert "all is well: 7 samples" in capsys.readouterr().out
    flip(folder / "00001.tar", 8 * 700)
    assert verify(folder, quarantine=True).newly_quarantined == 1
    assert keys_of(folder) == ["000000001", "000000003", "000000004", "000010002", "000010003"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "00000.tar").unlink(),
        lambda folder: os.truncate(folder / "00000.tar", 3000),
        lambda folder: os.truncate(folder / "00000.tar", 0),
        lambda folder: [
            (folder / f"00000{suffix}").unlink() for suffix in (".tar", ".tar.idx", ".parquet", "_stats.json")
        ],
        lambda folder: flip(folder / "00000.tar.idx", 70),
    ],
)
def test_a_shard_that_is_gone_goes_into_quarantine_and_the_rest_loads(folder, tmp_path, damage):
    damage(folder)
    with pytest.raises(UserError):
        keys_of(folder)
    assert verify(folder, quarantine=True).newly_quarantined == 4
    assert keys_of(folder) == ALL[4:]
    again = verify(folder)
    assert again and again.quarantined == 4
    manifest = Manifest.load(folder)
    assert [manifest.read_sidecar(number, ["key"]).num_rows for number in range(2)] == [0, 3]
    assert keys_of(make_view(folder, tmp_path / "view", "width > 72").directory) == ALL[5:]


def test_a_truncated_tar_is_one_problem_and_says_what_is_lost(folder):
    size = os.path.getsize(folder / "00000.tar")
    third = Manifest.load(folder).load_index(0)[2]
    os.truncate(folder / "00000.tar", int(third) + 10)
    (problem,) = verify(folder).problems
    assert problem.text.startswith(f"{int(third) + 10} bytes, manifest.json says {size}: 2 of 4 samples are lost")


def test_problems_of_sidecars_take_no_sample_out(folder):
    flip(folder / "00000.parquet", 999)
    verdict = verify(folder, quarantine=True)
    assert not verdict and verdict.newly_quarantined == 0
    assert not (folder / "quarantine.json").exists()


def test_a_tar_that_nobody_lists_is_named(folder):
    shutil.copy(folder / "00000.tar", folder / "00007.tar")
    (problem,) = verify(folder).problems
    assert (problem.file, "does not list" in problem.text) == ("00007.tar", True)


def test_a_view_is_verified_with_its_dataset(folder, tmp_path, capsys):
    make_view(folder, tmp_path / "view", "width > 40")
    assert verify(tmp_path / "view")
    for name in ("selection.bin", "manifest.json"):
        for byte in range(0, os.path.getsize(tmp_path / "view" / name), 7):
            flip(tmp_path / "view" / name, 8 * byte + byte % 8)
            try:
                problems = verify(tmp_path / "view").problems
                assert problems and {problem.file for problem in problems} <= {
                    str(tmp_path / "view" / part) for part in ("selection.bin", "manifest.json")
                }
            except UserError as error:
                assert "manifest.json" in str(error) or "view of" in str(error)
            flip(tmp_path / "view" / name, 8 * byte + byte % 8)
    flip(folder / "00001.tar", 8 * 700)
    (problem,) = verify(tmp_path / "view").problems
    assert (problem.file, problem.key) == ("00001.tar", "000010001")


def write_foreign(folder) -> None:
    import webdataset

    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(3):
                writer.write({"__key__": f"s{number}", "jpg": encode_noise(number), "txt": f"caption {number}"})


@pytest.mark.parametrize("hashed", [False, True])
def test_tars_of_others_are_verified_too(tmp_path, hashed):
    write_foreign(tmp_path / "tars")
    index_tars([str(tmp_path / "tars")], str(tmp_path / "out"), sidecars=True, hash=hashed, processes=1)
    assert verify(tmp_path / "out", decode=True)
    tar = tmp_path / "tars" / "00001.tar"
    with tarfile.open(tar) as archive:
        picture, text = archive.getmember("s1.jpg"), archive.getmember("s1.txt")
    for byte in (picture.offset + 5, picture.offset_data + 30):
        flip(tar, 8 * byte)
        (problem,) = verify(tmp_path / "out").problems
        assert (problem.file, problem.place, problem.key) == ("00001.tar", 1, "s1")
        flip(tar, 8 * byte)
    flip(tar, 8 * text.offset_data)
    problems = verify(tmp_path / "out").problems
    assert len(problems) == int(hashed)  # without hashes nobody can know
    assert all("in no sample that could be told" in problem.text for problem in problems)
    flip(tar, 8 * text.offset_data)
    tar.unlink()
    verify(tmp_path / "out", quarantine=True)
    assert len(ShardReader(Manifest.load(tmp_path / "out"))) == 3


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "none")
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UserError, match="Is it a finished build"):
        verify(tmp_path)


def test_random_bytes_in_any_file_never_break_it(folder):
    """Whatever the small files hold, there is a verdict or one clear line."""
    draw = np.random.default_rng(0)
    for name in sorted(set(os.listdir(folder)) - {"00000.tar", "00001.tar"}):
        content = (folder / name).read_bytes()
        for size in (0, 1, len(content) // 2, len(content) + 100):
            (folder / name).write_bytes(content[:size] if size < len(content) else draw.bytes(size))
            try:
                assert not verify(folder)
            except UserError:
                assert name == "manifest.json"
        (folder / name).write_bytes(content)
    assert verify(folder)


def test_the_command(folder, run_data_tools):
    run = run_data_tools("verify", folder, "--processes", 1)
    assert (run.returncode, run.stderr) == (0, "")
    assert "all is well: 7 samples" in run.stdout
    flip(folder / "00001.tar", 8 * 700)
    run = run_data_tools("verify", folder, "--processes", 2)
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.splitlines()[0].startswith("00001.tar: sample 0 000010001: its picture is not the one")
    run = run_data_tools("verify", folder, "--quarantine", "--json", "--processes", 1)
    facts = json.loads(run.stdout)
    assert (run.returncode, facts["newly_quarantined"], facts["problems"][0]["key"]) == (1, 1, "000010001")
    assert run_data_tools("verify", folder, "--processes", 1).returncode == 0
    assert "example:\n  python -m data_tools verify" in run_data_tools("verify", "--help").stdout
