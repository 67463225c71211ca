"""Which repair follows the end of a life: the cheapest that can help. Pure.

From the cheapest: start the processes again on the same nodes; put a spare node of the allocation in the place of a bad one; go
on with fewer nodes, and with more again when one comes back; give the allocation back and be queued again, without the bad
nodes; the next job of the chain; stop.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from launch.judge import Verdict


@dataclass(frozen=True)
class Repair:
    """What is done. `nodes` are those of the next life in the order of their ranks; none where this job ends."""

    action: str  # restart | swap | shrink | grow | requeue | resubmit | stop
    nodes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    spare: str | None = None  # what a swap has brought in, the first where it is several
    reason: str = ""


def choose_repair(
    verdict: Verdict,
    active: Sequence[str],
    spares: Sequence[str],
    bad: Collection[str],
    wanted: int,
    min_nodes: int,
    fits: Callable[[int], bool] = lambda nodes: True,
    restarts_left: int = 1,
) -> Repair:
    """What follows a life that nobody has asked to end.

    active     nodes of the life that has ended, in the order of their ranks
    spares     nodes of the allocation that answer and do nothing
    bad        nodes that are lost, or not to be used again
    wanted     nodes that the job asked for; min_nodes: with fewer it does not go on
    fits       whether the run can be divided over so many nodes
    """
    if verdict.stop:
        return Repair("stop", reason=verdict.reason)
    if restarts_left <= 0:
        return Repair("stop", reason=f"no restart is left (max_restarts); the last: {verdict.reason}")
    nodes, brought_in = place_spares(active, spares, bad, wanted)
    count = next((count for count in range(len(nodes), min_nodes - 1, -1) if fits(count)), None)
    if count is None:
        found = f"{len(nodes)} of at least {min_nodes} nodes are left"
        if len(nodes) >= min_nodes:
            found = f"the run cannot be divided over {min_nodes} to {len(nodes)} nodes"
        return Repair("requeue", excluded=tuple(sorted(bad)), reason=found)
    nodes = nodes[:count]
    brought_in = [node for node in brought_in if node in nodes]
    if count > len(active):
        action = "grow"
    elif count < len(active):
        action = "shrink"
    else:
        action = "swap" if brought_in else "restart"
    return Repair(action, tuple(nodes), tuple(sorted(bad)), brought_in[0] if brought_in else None, verdict.reason)


def place_spares(
    active: Sequence[str], spares: Sequence[str], bad: Collection[str], wanted: int
) -> tuple[list[str], list[str]]:
    """The nodes of the next life, at most `wanted`, and which of them were spares. A spare takes the place of a bad node, so
    that the other nodes keep their ranks."""
    free = [node for node in spares if node not in bad and node not in active]
    nodes, brought_in = [], []
    for node in active:
        if node in bad:
            if not free:
                continue
            node = free.pop(0)
            brought_in.append(node)
        nodes.append(node)
    more = free[: max(0, wanted - len(nodes))]
    return nodes + more, brought_in + more
