"""Where each rank's time went by the last report of a run, the slowest first, and which stragglers were put on record."""

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from pretrain.events import read_events
from pretrain.stragglers import Pace, render_straggler


def examine(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the ranks of the newest life last said of themselves, the slowest first, and the events of stragglers.

    Raises UserError for a folder that is no run, and for a run that has not reported yet.
    """
    events = read_events(run)
    sizes = [event["world_size"] for event in events if event["event"] == "start"]
    if not sizes:
        raise UserError(f"{run}: no training has begun there. Give the run folder of a training run (its `run:` key)")
    ranks = []
    for rank in range(sizes[-1]):  # files of more ranks are of an earlier life
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((Path(run) / "progress" / f"rank-{rank:05d}.json").read_text())
            pace = Pace(*(float(said[name]) for name in Pace._fields))
            ranks.append({"rank": rank, "host": str(said["host"]), "step": int(said["step"]), "pace": pace})
    if not ranks:
        raise UserError(f"{run}: no rank has reported yet: they do each train.log_every_steps")
    ranks.sort(key=lambda rank: rank["pace"].own_s, reverse=True)
    return ranks, [event for event in events if event["event"] == "straggler"]


def render(ranks: list[dict[str, Any]], stragglers: list[dict[str, Any]]) -> str:
    usual_s = statistics.median_low(rank["pace"].own_s for rank in ranks)
    width = max(4, *(len(rank["host"]) for rank in ranks))
    lines = [
        f"{'rank':>6} {'host':<{width}} {'step':>8} {'data_s':>9} {'compute_s':>9} {'wait_s':>9}  own, over median"
    ]
    for rank in ranks:
        data_s, compute_s, wait_s = rank["pace"]
        over = 100 * (rank["pace"].own_s / usual_s - 1) if usual_s > 0 else 0.0
        lines.append(
            f"{rank['rank']:>6} {rank['host']:<{width}} {rank['step']:>8} {data_s:>9.4f} {compute_s:>9.4f} {wait_s:>9.4f}  "
            f"{over:+15.0f} %"
        )
    lines += ["", *(map(render_straggler, stragglers) if stragglers else ["No straggler is on record."])]
    return "\n".join(lines)
