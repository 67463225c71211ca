"""The closed form of the expected goodput against a simulation of the events, and against cases that one can count."""

import math

import pytest

from launch.forecast import PUBLISHED_MTBF_H, best_interval, forecast, simulate

SHARES = ("productive", "checkpoint", "lost", "detect", "restart", "queue")


def shares(result) -> dict[str, float]:
    return {name: getattr(result, name) for name in SHARES}


@pytest.mark.parametrize("nodes", [1, 16, 128, 1024, 4096])
@pytest.mark.parametrize("rate", PUBLISHED_MTBF_H)
def test_the_closed_form_is_what_the_events_give(nodes: int, rate: str) -> None:
    mtbf_h = PUBLISHED_MTBF_H[rate]
    every_s = best_interval(mtbf_h * 3600 / nodes, 30.0)
    values = dict(detect_s=5.0, restart_s=120.0, save_stall_s=30.0, save_every_s=every_s, queue_s=1800.0, spares=2)
    expected = forecast(nodes, mtbf_h, **values)
    days = min(40000 * mtbf_h / nodes / 24, 8000.0) / 4  # some thousands of failures, where that does not take for ever
    found = simulate(nodes, mtbf_h, **values, days=days)
    assert sum(shares(expected).values()) == pytest.approx(1) and sum(shares(found).values()) == pytest.approx(1)
    for name in SHARES:
        assert shares(found)[name] == pytest.approx(shares(expected)[name], abs=0.015), name
    assert found.goodput == pytest.approx(expected.goodput, abs=0.01)


def test_without_failures_only_the_saves_cost() -> None:
    result = forecast(8, 1e9, 5, 60, save_stall_s=10, save_every_s=90)
    assert result.goodput == pytest.approx(0.9, abs=1e-3) and result.lost < 1e-3


def test_regular_failures_can_be_counted() -> None:
    # Each 60 s: 1 s to notice, 9 s to restart, 50 s of which 4.5 periods of 10 s are whole.
    result = forecast(1, 1 / 60, 1, 9, save_stall_s=2, save_every_s=8, regular=True)
    assert shares(result) == pytest.approx(
        {"productive": 36 / 60, "checkpoint": 9 / 60, "lost": 5 / 60, "detect": 1 / 60, "restart": 9 / 60, "queue": 0}
    )


def test_spares_save_the_queue_and_repaired_nodes_are_spares_again() -> None:
    values = dict(detect_s=5, restart_s=60, save_stall_s=10, save_every_s=600, queue_s=7200.0)
    queues = [forecast(256, 2000, **values, spares=spares).queue for spares in (0, 1, 4)]
    assert queues[0] > queues[1] > queues[2] > 0
    repaired = simulate(256, 2000, **values, spares=4, repair_h=12, days=60)
    assert repaired.queue < simulate(256, 2000, **values, spares=4, days=60).queue
    assert forecast(256, 2000, **values, lost_share=0.0).queue == 0


def test_what_is_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="nodes has to be greater than 0; found 0"):
        forecast(0, 100, 1, 1, 1, 1)
    assert math.isfinite(forecast(4096, 1, 60, 600, 60, 600).goodput), "hopeless, but a number"
