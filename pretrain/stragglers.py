"""Which rank the others wait for, and whether its data or its computing is late.

Ranks meet several times in a step, so all of them take as long as the slowest. What tells them apart is what each does
before it meets the others: a slow rank hardly waits in collectives, and the others wait there for it.
"""

import logging
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from pretrain.watch import Watch
from pretrain.world import World

log = logging.getLogger(__name__)

REPORTS = 3  # running, in which a rank has to be the slowest for the same reason
CAUSES = ("data", "compute")  # a slow connection keeps all ranks waiting, and cannot be told here


class Pace(NamedTuple):
    """Where a step's time goes on one rank, in seconds."""

    data_s: float  # waiting for its batch
    compute_s: float  # computing
    wait_s: float  # in collectives: waiting for the others, and sending

    @property
    def own_s(self) -> float:
        """What the others wait for."""
        return self.data_s + self.compute_s


class Slowest(NamedTuple):
    rank: int
    cause: str  # in which of CAUSES it differs more from the median
    over_median: float  # own_s, as a share above the median rank's


def find_slowest(paces: list[Pace]) -> Slowest:
    """The rank that the others wait for; the median of two ranks is the faster."""

    def median(name: str) -> float:
        return statistics.median_low(getattr(pace, name) for pace in paces)

    rank = max(range(len(paces)), key=lambda rank: paces[rank].own_s)
    cause = max(CAUSES, key=lambda cause: getattr(paces[rank], f"{cause}_s") - median(f"{cause}_s"))
    usual_s = median("own_s")
    return Slowest(rank, cause, paces[rank].own_s / usual_s - 1 if usual_s > 0 else 0.0)


class Stragglers:
    """Compares the ranks at each report, and puts on record one that is slower than the others time after time."""

    def __init__(self, watch: Watch, note: Callable[..., None], world: World) -> None:
        self.watch, self.note, self.world = watch, note, world
        self.hosts = world.gather_objects(watch.host)
        self.suspect: tuple[int, str] | None = None
        self.reports = 0  # running, of the suspect

    def report(self, step: int, rates: dict[str, float]) -> dict[str, float]:
        """Metrics of the slowest rank; `rates` are this rank's, as `Clock` gives them. Collective."""
        pace = Pace(*(rates[f"time/{name}"] for name in Pace._fields))
        self.watch.pace = pace._asdict()
        if self.world.size == 1:
            return {}
        paces = [Pace(*values) for values in self.world.gather_objects(tuple(pace))]
        slowest = find_slowest(paces)
        self.judge(step, slowest, paces)
        values = {f"straggler/{name}": value for name, value in paces[slowest.rank]._asdict().items()}
        return {"straggler/slowest_rank": slowest.rank, "straggler/over_median": slowest.over_median, **values}

    def judge(self, step: int, slowest: Slowest, paces: list[Pace]) -> None:
        suspect = (slowest.rank, slowest.cause) if slowest.over_median > self.watch.config.straggler_share else None
        self.reports = self.reports + 1 if suspect == self.suspect else 1
        self.suspect = suspect
        if suspect is None or self.reports != REPORTS:
            return
        facts: dict[str, Any] = {"rank": slowest.rank, "host": self.hosts[slowest.rank], "reason": slowest.cause}
        self.note("straggler", step, **facts, over_median=slowest.over_median, **paces[slowest.rank]._asdict())
        if self.world.is_main:
            log.warning("%s", render_straggler({"step": step, **facts, "over_median": slowest.over_median}))


def render_straggler(event: dict[str, Any]) -> str:
    """The event in a line."""
    doing = {"data": "waits for its data", "compute": "computes"}[event["reason"]]
    return (
        f"step {event['step']}: the others wait for rank {event['rank']} on {event['host']}, which {doing} "
        f"(its own time is {100 * event['over_median']:.0f} % over the median)"
    )
