"""Who the others wait for: real ranks of which one is slow, named with the cause; and a clean run, in which none is."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lives import LifeOfRun, arguments, events_of

from pretrain.__main__ import main
from pretrain.metrics import read_metrics
from pretrain.stragglers import Pace, Slowest, Stragglers, find_slowest
from pretrain.watch import WatchConfig
from pretrain.world import World

DELAY_S = 1.0  # far more than a step takes, also on a machine that has other work


def slow_data(run: Path) -> None:
    """Rank 1 waits for each batch."""
    from pretrain.data.loader import Batches

    plain = Batches.agree

    def slowly(batches, *others):
        if os.environ["RANK"] == "1":
            time.sleep(DELAY_S)
        return plain(batches, *others)

    Batches.agree = slowly


def slow_compute(run: Path) -> None:
    """Rank 1 computes long in a forward pass."""
    from pretrain import train

    plain = train.build_model

    def build(*others):
        model = plain(*others)
        if os.environ["RANK"] == "1":
            model.text_tower.register_forward_hook(lambda *_: time.sleep(DELAY_S / 2))  # twice a step, for matching
        return model

    train.build_model = build


@pytest.mark.parametrize(
    ("hook", "cause", "stage"), [(slow_data, "data", 2), (slow_compute, "compute", 3), (None, None, 1)]
)
def test_a_slow_rank_is_named_with_its_cause(
    hook, cause: str | None, stage: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    # Other work on the machine brings ranks nearer to each other, or further apart.
    steps, share = (8, 0.3) if cause else (4, 0.6)
    overrides = [f"train.duration={steps} steps", "train.log_every_steps=1"]
    overrides += [f"watch.straggler_share={share}", f"engine.zero_stage={stage}"]
    life = LifeOfRun(run, arguments(shards, run, *overrides), 2, hook)
    assert life.wait() == [0, 0], life.stderr()
    events, metrics = events_of(run, "straggler"), read_metrics(run)
    assert main(["doctor", "stragglers", str(run)]) == 0
    table = capsys.readouterr().out
    if cause is None:
        assert events == [] and "No straggler is on record" in table
        assert len(table.splitlines()) == 5
        return
    event = events[0]
    assert (event["rank"], event["reason"], event["host"]) == (1, cause, os.uname().nodename)
    assert event["step"] >= 3 and event[f"{cause}_s"] > 0.9 * DELAY_S and event["over_median"] > share
    assert f"the others wait for rank 1 on {os.uname().nodename}" in life.stderr()
    for line in metrics[event["step"] - 2 : event["step"]]:  # other work may slow rank 0 in the rest
        assert line["straggler/slowest_rank"] == 1 and line[f"straggler/{cause}_s"] > 0.9 * DELAY_S
        assert line["time/wait_s"] > max(0.5 * DELAY_S, line["straggler/wait_s"])  # rank 0, for rank 1
        assert line["time/data_s"] + line["time/compute_s"] + line["time/wait_s"] <= line["time/step_s"] + 1e-6
    rows = [line.split() for line in table.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["1", "0"] and "the others wait for rank 1" in table


@pytest.mark.parametrize(("paces", "expected"), [
    ([Pace(0, 1, 1), Pace(0, 2, 0)], Slowest(1, "compute", 1.0)),  # of two, the faster is the measure
    ([Pace(0.5, 1, 0), Pace(0, 1, 0.5), Pace(0, 1.2, 0.3)], Slowest(0, "data", 0.25)),
    ([Pace(0, 0, 1), Pace(0, 0, 1)], Slowest(0, "data", 0.0)),
])  # fmt: skip
def test_the_slowest_of_what_ranks_say(paces: list[Pace], expected: Slowest) -> None:
    assert find_slowest(paces) == pytest.approx(expected)


def test_only_what_lasts_is_put_on_record() -> None:
    noted, world = [], SimpleNamespace(size=2, is_main=False, gather_objects=lambda value: [value, value])
    watch = SimpleNamespace(host="node", config=WatchConfig(straggler_share=0.2), pace={})
    stragglers = Stragglers(watch, lambda event, step, **facts: noted.append((step, facts["reason"])), world)
    for step, letter in enumerate("cc.ccccdcddd.ddd"):  # computes long, like the other, waits for data
        slow = {"c": Pace(0, 1.3, 0), "d": Pace(0.5, 1, 0), ".": Pace(0, 1.1, 0)}[letter]
        stragglers.judge(step, find_slowest([Pace(0, 1, 0), slow]), [Pace(0, 1, 0), slow])
    assert noted == [(5, "compute"), (11, "data"), (15, "data")]
    rates = {"time/data_s": 0.1, "time/compute_s": 0.2, "time/wait_s": 0.3}
    alone = Stragglers(watch, noted.append, World())
    assert alone.report(1, rates) == {} and watch.pace == {"data_s": 0.1, "compute_s": 0.2, "wait_s": 0.3}


def test_a_folder_without_reports_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "stragglers", str(tmp_path)]) == 2
    assert "no training has begun there" in capsys.readouterr().err
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "start", "step": 0, "world_size": 2}\n')
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "rank-00000.json").write_text('{"rank": 0}')
    assert main(["doctor", "stragglers", str(tmp_path)]) == 2
    assert "no rank has reported yet" in capsys.readouterr().err
