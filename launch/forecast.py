"""What goodput to expect: how much of a job's time goes into steps that count, from how often nodes fail and what that costs.

`forecast` is a closed form, `simulate` plays the same events one by one, node by node; benchmarks/goodput.py compares both.

    one cycle, from the first step after a failure to the first step after the next:

    | save_every | stall | save_every | stall | ... | lost | detect | restart | (queue) |

Failures are independent of each other and of what the job does, and any node's failure ends the step of all. A node that
has failed is replaced by a spare one of the allocation; when none is left, the job waits in the queue for a whole allocation.
"""

import heapq
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

# Hours between failures of one node of 8 GPUs, as published. A job of N nodes fails N times as often.
PUBLISHED_MTBF_H = {
    # Llama Team, "The Llama 3 Herd of Models" (2024), 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
    "Llama 3": 54 * 24 * (16384 / 8) / 419,
    # Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), 2.5: 35 manual and an estimated 70 automatic
    # restarts for hardware in 2 months on 992 GPUs.
    "OPT-175B": 60 * 24 * (992 / 8) / 105,
    # Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters" (2024): 7.9 h at 1,024 GPUs.
    "Meta RSC": 7.9 * (1024 / 8),
}


@dataclass(frozen=True)
class Forecast:
    """Shares of the wall time; they add up to 1."""

    productive: float
    checkpoint: float
    lost: float
    detect: float
    restart: float
    queue: float
    failures_per_day: float  # of wall time
    best_save_every_s: float  # Young's interval for this rate of failures

    @property
    def goodput(self) -> float:
        """Of the time in which there are nodes, as `python -m launch report` has it."""
        return self.productive / (1 - self.queue) if self.queue < 1 else 0.0


def forecast(
    nodes: int,
    mtbf_h_per_node: float,
    detect_s: float,
    restart_s: float,
    save_stall_s: float,
    save_every_s: float,
    queue_s: float = 0.0,
    spares: int = 0,
    lost_share: float = 1.0,
    regular: bool = False,
) -> Forecast:
    """The expected shares in the long run.

    save_every_s   training time between two saves, without their stalls
    restart_s      from the notice of a failure to the next step
    queue_s        what a new allocation costs: the queue, and its start
    lost_share     of the failures, those after which the node is not used again; all others need no spare
    regular        failures come at about equal intervals, as in a test, instead of at random (exponential)
    """
    check(nodes=nodes, mtbf_h_per_node=mtbf_h_per_node, save_every_s=save_every_s)
    mean_s = mtbf_h_per_node * 3600 / nodes
    period_s = save_every_s + save_stall_s
    if regular:
        up_s = max(0.0, mean_s - detect_s - restart_s)
        # The failure comes anywhere between two saves: on average half a period after the last.
        periods, failures, starting_s = max(0.0, up_s / period_s - 0.5), 1.0, restart_s
    else:
        up_s = mean_s
        periods = 1 / math.expm1(min(period_s / mean_s, 700))
        failures = math.exp(min(restart_s / mean_s, 700))  # a restart may fail, too
        starting_s = mean_s * (failures - 1)
    times = {
        "productive": periods * save_every_s,
        "checkpoint": periods * save_stall_s,
        "lost": up_s - periods * period_s,
        "detect": failures * detect_s,
        "restart": starting_s,
        "queue": failures * lost_share * queue_s / (spares + 1),
    }
    total_s = sum(times.values())
    shares = {name: value / total_s for name, value in times.items()}
    return Forecast(
        **shares,
        failures_per_day=86400 * failures / total_s,
        best_save_every_s=best_interval(mean_s, save_stall_s),
    )


def best_interval(mean_s: float, save_stall_s: float) -> float:
    """Young's interval between saves (docs/resilience.md compares it with the best)."""
    return math.sqrt(2 * save_stall_s * mean_s)


def check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} has to be greater than 0; found {value}")


def simulate(
    nodes: int,
    mtbf_h_per_node: float,
    detect_s: float,
    restart_s: float,
    save_stall_s: float,
    save_every_s: float,
    queue_s: float = 0.0,
    spares: int = 0,
    lost_share: float = 1.0,
    days: float = 30.0,
    seed: int = 0,
    repair_h: float = math.inf,
) -> Forecast:
    """Play a job of so many days: each node has a clock of its own, and fails when that says so.

    Beyond the closed form: a failed node comes back as a spare `repair_h` later, if the allocation is still the same.
    """
    check(nodes=nodes, mtbf_h_per_node=mtbf_h_per_node, save_every_s=save_every_s)
    draw, end_s, mean_s = random.Random(seed), days * 86400, mtbf_h_per_node * 3600
    times = dict.fromkeys(("productive", "checkpoint", "lost", "detect", "restart", "queue"), 0.0)
    # The next failure of each node that works; node numbers are names, a replaced one is not drawn again.
    failing = [(draw.expovariate(1 / mean_s), number) for number in range(nodes)]
    heapq.heapify(failing)
    returning: list[float] = []  # when repaired nodes come back
    now_s, ready, failures = 0.0, spares, 0
    while now_s < end_s:
        fails_s, number = heapq.heappop(failing)
        up_s = max(0.0, fails_s - now_s)
        periods = math.floor(up_s / (save_every_s + save_stall_s))
        times["productive"] += periods * save_every_s
        times["checkpoint"] += periods * save_stall_s
        times["lost"] += up_s - periods * (save_every_s + save_stall_s)
        now_s += up_s
        while True:  # until a restart succeeds
            failures += 1
            times["detect"] += detect_s
            now_s += detect_s
            if draw.random() < lost_share:
                while returning and returning[0] <= now_s:
                    heapq.heappop(returning)
                    ready += 1
                if ready:
                    ready -= 1
                    if repair_h < math.inf:
                        heapq.heappush(returning, now_s + repair_h * 3600)
                else:  # given back; the next allocation has all nodes and spares
                    times["queue"] += queue_s
                    now_s += queue_s
                    ready, returning = spares, []
            # A node that waits, or is starting, fails later all the same: its clock goes on.
            heapq.heappush(failing, (now_s + draw.expovariate(1 / mean_s), number))
            while failing[0][0] < now_s:  # failed while the job waited for another one: replaced in the same restart
                _, idle = heapq.heappop(failing)
                heapq.heappush(failing, (now_s + draw.expovariate(1 / mean_s), idle))
            next_s, number = failing[0]
            if next_s >= now_s + restart_s:
                times["restart"] += restart_s
                now_s += restart_s
                break
            heapq.heappop(failing)
            times["restart"] += next_s - now_s
            now_s = next_s
    total_s = sum(times.values())
    shares: Mapping[str, float] = {name: value / total_s for name, value in times.items()}
    return Forecast(
        **shares,
        failures_per_day=86400 * failures / total_s,
        best_save_every_s=best_interval(mean_s / nodes, save_stall_s),
    )
