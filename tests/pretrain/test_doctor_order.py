"""`doctor order`: the keys that each rank would take, from sidecars or from the tars alone."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT, TINY

from data_tools.shards import Manifest, ShardReader
from pretrain.__main__ import main
from pretrain.config import ConfigError, load_config
from pretrain.doctor.order import print_order
from pretrain.train import RunConfig


def lines(path: Path, *arguments: int, batch: int = 8) -> list[list[str]]:
    config = load_config(TINY, [f"data.path={path}", "run=none", f"train.batch_size={batch}"], RunConfig)
    out = io.StringIO()
    print_order(config, *arguments, out)
    return [line.split("\t") for line in out.getvalue().splitlines()]


def test_an_epoch_is_every_key_once_on_any_number_of_ranks(shards: Path) -> None:
    path = shards / "train"
    alone = lines(path, 1, 0, 0, 6)
    reader = ShardReader(Manifest.load(path))
    assert sorted(key for *_, key in alone) == sorted(reader.read(index).key for index in range(48))
    assert [line[:3] for line in alone] == [[str(row // 8), str(row), str(path)] for row in range(48)]
    for world_size in (2, 4):
        together = [line for rank in range(world_size) for line in lines(path, world_size, rank, 2, 4)]
        assert sorted(together, key=lambda line: int(line[1])) == alone[16:]


def test_keys_come_from_the_tars_where_sidecars_are_missing(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "train", tmp_path / "train")
    with_sidecars = lines(tmp_path / "train", 1, 0, 0, 2)
    for sidecar in (tmp_path / "train").glob("*.parquet"):
        sidecar.unlink()
    assert lines(tmp_path / "train", 1, 0, 0, 2) == with_sidecars


@pytest.mark.parametrize("sidecars", [True, False])
def test_samples_in_quarantine_are_not_counted(shards: Path, tmp_path: Path, sidecars: bool) -> None:
    shutil.copytree(shards / "train", tmp_path / "train")
    gone = ShardReader(Manifest.load(shards / "train")).read(1).key
    (tmp_path / "train" / "quarantine.json").write_text('{"00000.tar": {"1": "damaged"}}')
    for sidecar in (tmp_path / "train").glob("*.parquet"):
        if not sidecars:
            sidecar.unlink()
    keys = [key for *_, key in lines(tmp_path / "train", 1, 0, 0, 47, batch=1)]
    assert len(set(keys)) == 47 and gone not in keys


def test_a_rank_that_is_not_there_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be shared equally by 3 ranks"):
        lines(shards / "train", 3, 0, 0, 1)
    with pytest.raises(ConfigError, match="no rank 2 among 2; valid are 0 to 1"):
        lines(shards / "train", 2, 2, 0, 1)


@pytest.mark.parametrize("start", [10**15, 10**18, 10**40])
def test_steps_that_no_run_reaches_are_refused_in_a_line(start: int, shards: Path, capsys) -> None:
    arguments = ["doctor", "order", str(TINY), "--start", str(start), f"data.path={shards / 'train'}", "run=none"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "beyond the last that can be shown, 125,000,000,000,000" in line
    assert len(lines(shards / "train", 1, 0, 10**14, 1)) == 8


def test_the_command(shards: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["doctor", "order", str(TINY), "--world-size", "2", "--rank", "1", "--start", "3", "--steps", "2"]
    assert main([*arguments, f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"]) == 0
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert printed == lines(shards / "train", 2, 1, 3, 2) and len(printed) == 8


def test_a_reader_that_goes_ends_it_quietly(shards: Path) -> None:
    command = f"{sys.executable} -m pretrain doctor order {TINY} run=none data.path={shards / 'train'} --steps 20000"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 2)
