"""`doctor loader`: what it measures adds up, and what it says of the order is the order's."""

import json
import os
import time
from pathlib import Path

import pytest
from paths import TINY

from data_tools.shards import ShardError
from pretrain.__main__ import main
from pretrain.config import ConfigError, load_config
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
    assert list(report["stages_s"]) == ["read", "decode", "crop", "tokenise", "collate", "wait"]
    assert all(seconds > 0 for name, seconds in report["stages_s"].items() if name != "crop")
    assert set(report["samples_per_s"]) == {"1", "2"} and report["threads"] in (1, 2) and report["bad"] == 0
    assert report["streams"] == 1 and list(report["read_amplification"].values()) == [
        {"1": pytest.approx(1, 0.01), "8": pytest.approx(8, 0.3)}
    ]
    lines = text.replace(str(shards), "shards").splitlines()
    assert "What limits: " in text and max(map(len, lines)) <= 120


def test_a_slow_store_is_what_limits(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = supply.IndexedSupply.read

    def read_slowly(self, *arguments):
        time.sleep(0.02)
        return read(self, *arguments)

    monkeypatch.setattr(supply.IndexedSupply, "read", read_slowly)
    config = load_config(TINY, [f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"], RunConfig)
    report = doctor.examine(config, threads=[1, 4])
    wait_s = report["stages_s"].pop("wait")  # a step that takes no time waits for each sample as long as it takes
    assert wait_s > 0.02 / 8  # by four threads, of which each takes 20 ms or more
    report["stages_s"]["wait"] = 0.0
    assert "What limits: the step, not the loader" in doctor.render(report)
    report["stages_s"]["wait"] = wait_s
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


@pytest.mark.parametrize(("step_s", "limit"), [(0.6, "the step"), pytest.param(0.05, "read", marks=pytest.mark.faults)])
def test_the_wait_depends_on_the_step(step_s: float, limit: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = supply.IndexedSupply.read

    def read_slowly(self, *arguments):
        time.sleep(0.02)  # 160 ms a batch
        return read(self, *arguments)

    monkeypatch.setattr(supply.IndexedSupply, "read", read_slowly)
    monkeypatch.setattr(doctor, "LITTLE_WAIT", 0.15)  # for a machine that has other work
    config = load_config(TINY, [f"data.path={shards / 'train'}", "run=none", "train.batch_size=8"], RunConfig)
    report = doctor.examine(config, threads=[1], step_s=step_s)
    wait_s = 8 * report["stages_s"]["wait"]
    assert wait_s < 0.09 if limit == "the step" else wait_s > 0.08
    assert f"What limits: {limit}" in doctor.render(report)


def test_a_rank_has_its_share_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(cores))
    with doctor.take_share(5) as cores:
        assert cores == 3 and kept == [[0, 1, 2]]
    assert kept[-1] == list(range(16))
    with pytest.raises(ConfigError, match="17 ranks are more than the 16 processors"), doctor.take_share(17):
        pass
    facts = {"ahead_mib": 128.0, "peak_memory_gib": 2.0, "node_memory_gib": 64.0, "ranks_per_node": 5}
    assert "10.0 of 64 GiB by 5 ranks" in doctor.describe_memory(facts)
