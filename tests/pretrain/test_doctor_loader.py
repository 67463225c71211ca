"""`doctor loader`: what it measures adds up, and what it says of the order is the order's."""

import json
import time
from pathlib import Path

import pytest
from paths import TINY

from data_tools.shards import ShardError
from pretrain.__main__ import main
from pretrain.config import load_config
from pretrain.data import supply
from pretrain.doctor import loader as doctor
from pretrain.train import RunConfig


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_S", 0.2)
    monkeypatch.setattr(doctor, "STAGE_SAMPLES", 40)


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "loader.json"
    overrides = [f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"]
    assert main(["doctor", "loader", str(TINY), *overrides, "--threads", "1", "2", "--json", str(out)]) == 0
    report, text = json.loads(out.read_text()), capsys.readouterr().out
    assert list(report["stages_s"]) == ["read", "decode", "crop", "tokenise", "collate"]
    assert all(seconds > 0 for name, seconds in report["stages_s"].items() if name != "crop")
    assert set(report["samples_per_s"]) == {"1", "2"} and report["threads"] in (1, 2) and report["bad"] == 0
    assert report["streams"] == 1 and list(report["read_amplification"].values()) == [
        {"1": pytest.approx(1, 0.01), "8": pytest.approx(8, 0.3)}
    ]
    assert "What limits: " in text and max(map(len, text.splitlines())) <= 120


def test_a_slow_store_is_what_limits(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = supply.IndexedSupply.read

    def read_slowly(self, *arguments):
        time.sleep(0.02)
        return read(self, *arguments)

    monkeypatch.setattr(supply.IndexedSupply, "read", read_slowly)
    config = load_config(TINY, [f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"], RunConfig)
    report = doctor.examine(config, threads=[1, 4])
    assert max(report["stages_s"], key=report["stages_s"].get) == "read" and report["stages_s"]["read"] > 0.02
    assert report["samples_per_s"][4] > 2 * report["samples_per_s"][1] and report["threads"] == 4
    assert "What limits: read" in doctor.render(report)


def test_a_first_sample_that_is_bad(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = supply.IndexedSupply.read

    def read_all_but_the_first(self, draw, row: int, attempt: int):
        if draw.positions[row] == 0 and not attempt:
            raise ShardError("a damaged header")
        return read(self, draw, row, attempt)

    monkeypatch.setattr(supply.IndexedSupply, "read", read_all_but_the_first)
    config = load_config(TINY, [f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"], RunConfig)
    report = doctor.examine(config, threads=[2, 1])
    assert report["bad"] == 1 and list(report["samples_per_s"]) == [1, 2]
